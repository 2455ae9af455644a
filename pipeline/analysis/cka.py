"""Linear CKA says how similar two representations of the same examples are (Kornblith et al. 2019,
arXiv 1905.00414): 1 for equal ones, also after a rotation or a change of scale, near 0 for
independent ones.

As in Nguyen, Raghu and Kornblith (2021, arXiv 2010.15327) it is computed from minibatches, with the
estimator of HSIC by Song et al. (2012) that has no bias, however small the minibatches are.

There are packages for this. Those that were looked at hook modules, of which a ring has one for all
of its levels, feed a model from a loader of single tensors, or cut negative values off, which an
estimate without bias must be allowed to have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class MinibatchCKA:
    """CKA between all of L representations and all of M others, minibatch by minibatch."""

    def __init__(self) -> None:
        self._cross = self._left = self._right = torch.zeros(())

    def add(self, left: Tensor, right: Tensor) -> None:
        """Take a minibatch in. Examples should be dealt to minibatches at random.

        :param left: L representations of n examples, `[L, n, d]`.
        :param right: M others, `[M, n, e]`; n is 4 or more.
        """
        ours, others = _centred_gram(left), _centred_gram(right)
        self._cross = self._cross + ours @ others.T
        self._left = self._left + (ours * ours).sum(1)
        self._right = self._right + (others * others).sum(1)

    def value(self) -> Tensor:
        """Return HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with each HSIC averaged over minibatches.

        :returns: `[L, M]`, float64; not a number where a representation is the same for all
            examples.
        """
        return self._cross / (self._left[:, None] * self._right).sqrt()


def _centred_gram(x: Tensor) -> Tensor:
    """Return K = x xᵀ centred so that ⟨K, L⟩ / (n (n - 3)) is Song et al.'s HSIC (Székely and Rizzo
    2014 call it U-centred), divided by √(n (n - 3)).

    :param x: `[L, n, d]`.
    :returns: `[L, n²]`, float64.
    """
    x = x.double()
    x = x - x.mean(1, keepdim=True)  # changes nothing but rounding
    n = x.size(1)
    gram = x @ x.mT
    gram.diagonal(dim1=1, dim2=2).zero_()
    rows = gram.sum(2, keepdim=True) / (n - 2)
    total = gram.sum((1, 2), keepdim=True) / ((n - 1) * (n - 2))
    centred = gram - rows - rows.mT + total
    centred.diagonal(dim1=1, dim2=2).zero_()
    return centred.flatten(1) / math.sqrt(n * (n - 3))
