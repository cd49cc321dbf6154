"""Compiled kernels for CPUs: a Llama's whole step as one function, made by numba at a worker's first start.

`tiles` are the inner loops, written as LLVM vector code; `linear`, `rows` and `attention` are built of them; `step`
calls these in order, on every thread of the `team`; `packing` puts weights into the layout that tiles read; `library`
keeps the machine code of all that, which `compiling` makes once per machine.
"""
