"""`fusedopt inspect`: what a configuration's kernels do, read from their machine code, without a GPU.

`emulator.py` is the heart: it walks the disassembly of one program as the GPU would and writes down every access.
`interpreted.py` counts the same in Triton's interpreter; both must agree in every byte.
"""
