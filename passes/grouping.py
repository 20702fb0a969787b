"""stub"""
from .ledger import PassReport
def group_kernels(graph):
    return graph.copy(), PassReport("GroupKernels")
