"""The kernels as an Ada GPU (sm_89) runs them, compiled and read back without one.

``counts``: registers, shared memory and instructions of each build. ``model``: time on a card of which there is only a
data sheet, always called *projected*. ``driver``: the same PTX run on a Hopper GPU.
"""
