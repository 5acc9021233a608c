"""Between processes; the only package that may import torch.distributed."""

from fastlocal.comm.data_parallel import averages_gradients as averages_gradients
from fastlocal.comm.find import find_group as find_group
from fastlocal.comm.find import groups_of_pieces as groups_of_pieces
from fastlocal.comm.find import is_process_group as is_process_group
from fastlocal.comm.find import several_processes_run as several_processes_run
from fastlocal.comm.group import Group as Group
from fastlocal.comm.group import LostRankError as LostRankError
from fastlocal.comm.group import Operation as Operation
from fastlocal.comm.group import ring_bytes as ring_bytes
from fastlocal.comm.launch import RendezvousError as RendezvousError
from fastlocal.comm.launch import join as join
from fastlocal.comm.launch import launched_processes as launched_processes
from fastlocal.comm.launch import launched_rank as launched_rank
from fastlocal.comm.launch import leave as leave
from fastlocal.comm.launch import local_rank as local_rank
from fastlocal.comm.launch import note_for_restarts as note_for_restarts
from fastlocal.comm.launch import was_noted as was_noted
from fastlocal.comm.pieces import are_cut_alike as are_cut_alike
from fastlocal.comm.pieces import cut_of as cut_of
from fastlocal.comm.pieces import cuts_of as cuts_of
from fastlocal.comm.pieces import held_here as held_here
from fastlocal.comm.pieces import is_sharded as is_sharded
from fastlocal.comm.pieces import place_of as place_of
from fastlocal.comm.pieces import ranks_on_mesh as ranks_on_mesh
from fastlocal.comm.pieces import sum_over_pieces_ as sum_over_pieces_
from fastlocal.comm.sum import Sum as Sum
