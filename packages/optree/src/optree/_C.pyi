# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: A001, N999

import builtins
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Generic, SupportsIndex, SupportsInt, TypeVar

from typing_extensions import Self, TypeAlias, final

from optree.accessors import PyTreeAccessor, PyTreeEntry
from optree.typing import FlattenFunc, MetaData, PyTree, UnflattenFunc

_T = TypeVar("_T")
_U = TypeVar("_U")
_F = TypeVar("_F", bound=Callable[..., Any])

# Facts about the build

BUILDTIME_METADATA: Final[Mapping[str, Any]]
CPYTHON_INTERNALS: Final[Mapping[str, bool]]
PY_VERSION: Final[str]
PY_VERSION_HEX: Final[int]
Py_DEBUG: Final[bool]
Py_GIL_DISABLED: Final[bool]
PYBIND11_VERSION_HEX: Final[int]
PYBIND11_INTERNALS_VERSION: Final[int]
PYBIND11_INTERNALS_ID: Final[str]
PYBIND11_MODULE_LOCAL_ID: Final[str]
PYBIND11_HAS_NATIVE_ENUM: Final[bool]
PYBIND11_HAS_INTERNALS_WITH_SMART_HOLDER_SUPPORT: Final[bool]
PYBIND11_HAS_SUBINTERPRETER_SUPPORT: Final[bool]
GLIBCXX_USE_CXX11_ABI: Final[bool]
MSVC_DISABLE_CONSTEXPR_MUTEX_CONSTRUCTOR: Final[bool]
OPTREE_HAS_SUBINTERPRETER_SUPPORT: Final[bool]
OPTREE_HAS_READ_WRITE_LOCK: Final[bool]
OPTREE_HAS_FROZENDICT: Final[bool]
Py_TPFLAGS_BASETYPE: Final[int]
PyStructSequence_UnnamedField: Final[str]
MAX_RECURSION_DEPTH: Final[int]

@final
class InternalError(SystemError): ...

@final
class PyTreeKind(enum.IntEnum):
    CUSTOM = 0
    LEAF = 1
    NONE = 2
    TUPLE = 3
    LIST = 4
    DICT = 5
    NAMEDTUPLE = 6
    ORDEREDDICT = 7
    DEFAULTDICT = 8
    DEQUE = 9
    STRUCTSEQUENCE = 10
    FROZENDICT = 11

    NUM_KINDS: Final[int]

@final
class PyTreeSpec:
    # Specs are made by functions: calling the class raises TypeError.
    def __init__(self, /, *args: Any, **kwargs: Any) -> None: ...
    @property
    def num_leaves(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def num_children(self) -> int: ...
    @property
    def none_is_leaf(self) -> bool: ...
    @property
    def namespace(self) -> str: ...
    @property
    def type(self) -> builtins.type | None: ...
    @property
    def kind(self) -> PyTreeKind: ...
    def unflatten(self, leaves: Iterable[_T], /) -> PyTree[_T]: ...
    def flatten_up_to(self, tree: PyTree[_T], /) -> list[PyTree[_T]]: ...
    def broadcast_to_common_suffix(self, other: PyTreeSpec, /) -> PyTreeSpec: ...
    def compose(self, inner: PyTreeSpec, /) -> PyTreeSpec: ...
    def transform(
        self,
        /,
        f_node: Callable[[PyTreeSpec], PyTreeSpec] | None = None,
        f_leaf: Callable[[PyTreeSpec], PyTreeSpec] | None = None,
    ) -> PyTreeSpec: ...
    def traverse(
        self,
        leaves: Iterable[_T],
        /,
        f_node: Callable[[Any], _U] | None = None,
        f_leaf: Callable[[_T], _U] | None = None,
    ) -> Any: ...
    def walk(
        self,
        leaves: Iterable[_T],
        /,
        f_node: Callable[[builtins.type, MetaData, tuple[_U, ...]], _U] | None = None,
        f_leaf: Callable[[_T], _U] | None = None,
    ) -> Any: ...
    def paths(self) -> list[tuple[Any, ...]]: ...
    def accessors(self) -> list[PyTreeAccessor]: ...
    def entries(self) -> list[Any]: ...
    def entry(self, index: SupportsInt | SupportsIndex, /) -> Any: ...
    def children(self) -> list[PyTreeSpec]: ...
    def child(self, index: SupportsInt | SupportsIndex, /) -> PyTreeSpec: ...
    def one_level(self) -> PyTreeSpec | None: ...
    def is_leaf(self, *, strict: bool = True) -> bool: ...
    def is_one_level(self) -> bool: ...
    def is_prefix(self, other: PyTreeSpec, /, *, strict: bool = False) -> bool: ...
    def is_suffix(self, other: PyTreeSpec, /, *, strict: bool = False) -> bool: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __lt__(self, other: PyTreeSpec, /) -> bool: ...
    def __le__(self, other: PyTreeSpec, /) -> bool: ...
    def __gt__(self, other: PyTreeSpec, /) -> bool: ...
    def __ge__(self, other: PyTreeSpec, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __len__(self, /) -> int: ...
    def __copy__(self) -> Self: ...
    def __getstate__(self, /) -> tuple[tuple[tuple[Any, ...], ...], bool, str]: ...
    def __setstate__(self, state: tuple[tuple[tuple[Any, ...], ...], bool, str], /) -> None: ...

@final
class PyTreeIter(Iterator[_T], Generic[_T]):
    def __new__(
        cls,
        tree: PyTree[_T],
        /,
        leaf_predicate: Callable[[Any], bool] | None = None,
        none_is_leaf: bool = False,
        namespace: str = "",
    ) -> Self: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> _T: ...

# Trees

def compiled(prototype: _F, /) -> _F: ...
def set_one_level(
    output_class: type[tuple[Any, ...]],
    metadata_class: type[list[Any]],
    sorted_handlers: tuple[tuple[Any, dict[str, Any]] | None, ...],
    insertion_ordered_handlers: tuple[tuple[Any, dict[str, Any]] | None, ...],
    /,
) -> None: ...
def flatten(
    tree: PyTree[_T],
    /,
    leaf_predicate: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[_T], PyTreeSpec]: ...
def flatten_with_path(
    tree: PyTree[_T],
    /,
    leaf_predicate: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[tuple[Any, ...]], list[_T], PyTreeSpec]: ...
def leaves(
    tree: PyTree[_T],
    leaf_predicate: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
    /,
) -> list[_T]: ...
def structure(
    tree: PyTree[_T],
    leaf_predicate: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
    /,
) -> PyTreeSpec: ...
def map(
    func: Callable[..., _U],
    tree: PyTree[_T],
    rests: tuple[PyTree[Any], ...],
    leaf_predicate: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
    /,
) -> PyTree[_U]: ...
def map_(
    func: Callable[..., Any],
    tree: PyTree[_T],
    rests: tuple[PyTree[Any], ...],
    leaf_predicate: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
    /,
) -> PyTree[_T]: ...
def call_rows(func: Callable[..., _U], columns: list[Any], /) -> list[_U]: ...
def is_leaf(
    obj: PyTree[_T],
    /,
    leaf_predicate: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> bool: ...
def all_leaves(
    iterable: Iterable[PyTree[_T]],
    leaf_predicate: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
    /,
) -> bool: ...

# Specs

def make_leaf(none_is_leaf: bool = False, namespace: str = "") -> PyTreeSpec: ...
def make_none(none_is_leaf: bool = False, namespace: str = "") -> PyTreeSpec: ...
def make_from_collection(
    collection: Any,
    /,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTreeSpec: ...

# Node types

# The attributes of a class that is flattened without calling its functions: the names of the
# children, the names of the metadata, the parameters of `__init__` for both, the order in which
# `__init__` assigns them, a predicate that returns whether `__init__` does nothing else, and the
# argument that `__init__` replaces by another value (the factory placeholder of dataclasses).
Attributes: TypeAlias = tuple[
    tuple[str, ...],
    tuple[str, ...],
    tuple[str, ...],
    tuple[int, ...],
    Callable[[type], bool] | None,
    object,
]

def register_node(
    cls: type[Any],
    /,
    flatten_func: FlattenFunc[Any],
    unflatten_func: UnflattenFunc[Any],
    path_entry_type: type[PyTreeEntry],
    namespace: str = "",
    attributes: Attributes | None = None,
) -> None: ...
def unregister_node(cls: type[Any], /, namespace: str = "") -> None: ...
def get_registry_size(namespace: str | None = None) -> int: ...
def is_dict_insertion_ordered(
    namespace: str = "",
    inherit_global_namespace: bool = True,
) -> bool: ...
def set_dict_insertion_ordered(mode: bool, /, namespace: str = "") -> None: ...
def is_namedtuple(obj: Any, /) -> bool: ...
def is_namedtuple_instance(obj: object, /) -> bool: ...
def is_namedtuple_class(cls: object, /) -> bool: ...
def namedtuple_fields(obj: Any, /) -> tuple[str, ...]: ...
def is_structseq(obj: Any, /) -> bool: ...
def is_structseq_instance(obj: object, /) -> bool: ...
def is_structseq_class(cls: object, /) -> bool: ...
def structseq_fields(obj: Any, /) -> tuple[str, ...]: ...

# Caches

def clear_caches() -> None: ...
def set_stock_classes(classes: tuple[type[Any], ...], /) -> None: ...

# Interpreters

def get_num_interpreters_seen() -> int: ...
def get_num_interpreters_alive() -> int: ...
def get_alive_interpreter_ids() -> set[int]: ...
def is_current_interpreter_main() -> bool: ...
def get_current_interpreter_id() -> int: ...
def get_main_interpreter_id() -> int: ...
