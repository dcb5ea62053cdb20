# SPDX-License-Identifier: Apache-2.0
"""Build specs from specs: the functions ``optree.treespec_*`` under short names.

Examples:
    >>> import optree
    >>> import optree.treespec as pts
    >>> pts.dict({'b': pts.tuple([pts.leaf(), pts.none()]), 'a': pts.leaf()})
    PyTreeSpec({'a': *, 'b': (*, None)})
    >>> pts.dict is optree.treespec_dict
    True
"""

from __future__ import annotations

from optree.ops import treespec_defaultdict as defaultdict
from optree.ops import treespec_deque as deque
from optree.ops import treespec_dict as dict  # noqa: A004
from optree.ops import treespec_from_collection as from_collection
from optree.ops import treespec_frozendict as frozendict
from optree.ops import treespec_leaf as leaf
from optree.ops import treespec_list as list  # noqa: A004
from optree.ops import treespec_namedtuple as namedtuple
from optree.ops import treespec_none as none
from optree.ops import treespec_ordereddict as ordereddict
from optree.ops import treespec_structseq as structseq
from optree.ops import treespec_tuple as tuple  # noqa: A004

__all__ = [  # noqa: RUF022 # grouped
    "leaf",
    "none",
    "tuple",
    "list",
    "dict",
    "namedtuple",
    "ordereddict",
    "defaultdict",
    "deque",
    "structseq",
    "frozendict",
    "from_collection",
]
