"""Runs the PTX that Triton makes of the kernels, in numpy: compiled code is tested without a GPU.

| file | job |
|---|---|
| `text.py` | PTX text -> instructions |
| `compiler.py`, `kernels.py` | kernels compiled in a process of their own; launches of the package's launchers run here |
| `block.py` | the threads of a program: registers, branches, barriers, what was counted |
| `decode.py` | an instruction's text -> a function; the tables of `arithmetic`, `memory_access`, `warps` and `tensor_cores` |
| `memory.py`, `races.py` | global and shared memory: wild, misaligned and unordered accesses are faults |

    with executed(90) as launches:              # on sm_90; every Triton kernel of the package is replaced
        backend.cross_attention(..., tiles=launches.tiles)
    launches.seen                               # the launches with the counts of each program
"""
