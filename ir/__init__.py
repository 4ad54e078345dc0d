"""What a program is: ops, types, text form, verification, checkpoints and capture."""

from kvc8.ir import mixture_ops as mixture_ops
from kvc8.ir import ops as ops
from kvc8.ir import rank_ops as rank_ops
