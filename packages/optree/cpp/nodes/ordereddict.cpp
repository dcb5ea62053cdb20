// SPDX-License-Identifier: Apache-2.0
#include "nodes/ordereddict.h"

#include "nodes/gather.h"

namespace optree {
namespace {

// The order of an OrderedDict is a linked list that CPython does not expose; after move_to_end it
// differs from the order of the dict underneath. The iterator protocol gives it at several times
// the cost of the scan (benchmarks/optree, ResNet module trees), so the list is read directly where
// its layout is the known one of CPython 3.9 to 3.13. This file is the only one that knows it.
//
// It agrees with the dict as long as nobody goes around the OrderedDict, by dict.__setitem__,
// dict.popitem and the like. What that leaves behind is found: other keys in the list than in the dict,
// or a table that something was taken out of. Then the iterator has its say, KeyError included.
#define OPTREE_ODICT_LIST OPTREE_DICT_KEYS
#if OPTREE_ODICT_LIST
struct ListNode {
    PyObject* key;
    Py_hash_t hash;
    ListNode* next;
    ListNode* previous;
};

struct ListHead {
    PyDictObject dict;
    ListNode* first;
    ListNode* last;
    ListNode** fast_nodes;
    Py_ssize_t fast_nodes_size;
    void* resize_sentinel;
    std::size_t changes;
    PyObject* inst_dict;
    PyObject* weakreflist;
};

const ListHead& list_of(PyObject* object) noexcept { return *reinterpret_cast<ListHead*>(object); }

// Whether the list has these keys, the very objects, in this order.
OPTREE_INLINE bool list_has(const ListHead& head, PyObject* const* keys,
                            std::size_t size) noexcept {
    const ListNode* node = head.first;
    for (PyObject* const* end = keys + size; keys != end; ++keys) {
        if (OPTREE_UNLIKELY(node == nullptr || node->key != *keys)) return false;
        node = node->next;
    }
    return node == nullptr;
}
#endif

}  // namespace

bool OrderedDict::is_empty([[maybe_unused]] const State& state, PyObject* object) noexcept {
#if OPTREE_ODICT_LIST
    if (OPTREE_LIKELY(state.odict_fast)) return list_of(object).first == nullptr;
#endif
    return PyDict_GET_SIZE(object) == 0;
}

// A layout found by the order of the dict underneath is right if the list agrees with it.
KeyLayout* OrderedDict::gather_known([[maybe_unused]] Context& context,
                                     [[maybe_unused]] PyObject* object,
                                     [[maybe_unused]] PyObject** out) {
#if OPTREE_ODICT_LIST
    if (OPTREE_UNLIKELY(!context.state.odict_fast || PyDict_GET_SIZE(object) == 0 ||
                        !only_grew(object))) {
        return nullptr;
    }
    KeyLayout* known = optree::gather_known(context.state.layouts(), object, false, out);
    const bool agrees = known != nullptr && list_has(list_of(object), known->inserted, known->size);
    return OPTREE_LIKELY(agrees) ? known : nullptr;
#else
    return nullptr;
#endif
}

#if OPTREE_ODICT_LIST
namespace {

Ref trial_dict() {
    Ref trial = checked(PyODict_New());
    for (const char* name : {"a", "b", "c"}) {
        const Ref key = checked(PyUnicode_InternFromString(name));
        check_status(PyODict_SetItem(trial.get(), key.get(), Py_None));
    }
    return trial;
}

}  // namespace
#endif

bool ordereddict_list_is_readable() {
#if OPTREE_ODICT_LIST
    if (PyODict_Type.tp_basicsize != static_cast<Py_ssize_t>(sizeof(ListHead))) return false;
    const Ref trial = trial_dict();
    if (!only_grew(trial.get())) return false;
    checked(PyObject_CallMethod(trial.get(), "move_to_end", "s", "a"));
    // Only follow pointers that the dict's own keys vouch for.
    const ListNode* node = list_of(trial.get()).first;
    for (const char* name : {"b", "c", "a"}) {
        const Ref key = checked(PyUnicode_InternFromString(name));
        if (node == nullptr || node->key != key.get()) return false;
        node = node->next;
    }
    if (node != nullptr || !only_grew(trial.get())) return false;
    check_status(PyDict_DelItemString(trial.get(), "b"));
    const Ref popped = trial_dict();
    checked(PyObject_CallMethod(reinterpret_cast<PyObject*>(&PyDict_Type), "popitem", "O",
                                popped.get()));
    return !only_grew(trial.get()) && !only_grew(popped.get());
#else
    return false;
#endif
}

Ref OrderedDict::scan_unknown(Context& context, PyObject* object, ObjectStack& children) {
    const CriticalSection reading(object);
    ObjectStack keys;
    ObjectStack values;
    const Ref iterator = checked(PyObject_GetIter(object));
    while (PyObject* key = PyIter_Next(iterator.get())) {
        keys.push_owned(key);
        PyObject* value = compat::dict_item(object, key);
        if (value == nullptr) {
            if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
            throw PythonError{};
        }
        values.push_owned(value);
    }
    if (PyErr_Occurred()) throw PythonError{};
    LayoutCache& cache = context.state.layouts();
    Ref layout = Ref::borrow(reinterpret_cast<PyObject*>(cache.find(keys.data(), keys.size())));
    if (!layout) {
        layout = make_layout(context.state.layout(), keys.data(), keys.size(), false);
        cache.offer(as_layout(layout.get()));
    }
    children.reserve(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) children.push_unchecked(values[i]);
    return layout;
}

}  // namespace optree
