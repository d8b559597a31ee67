"""How bytes move: the Triton kernels behind fusedopt. Knows no rule by name and never imports fusedopt."""
