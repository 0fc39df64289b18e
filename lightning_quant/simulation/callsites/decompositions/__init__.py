"""Operations that PyTorch has as one and an NPU as several: each rewritten with those that the NPU has.

What is called in these files is computed at call sites again, so that every value in between gets a range. With
nothing rounded the results are those of PyTorch within the order of float32 sums; random numbers are drawn in the same
order. A function ``supports_...`` says for which arguments the decomposition of that name computes the same.
"""
