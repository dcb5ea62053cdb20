// SPDX-License-Identifier: Apache-2.0
#include "nodes/ordereddict.h"

#include "nodes/gather.h"

#include <vector>

namespace optree {
namespace {

// The order of an OrderedDict is a linked list that CPython does not expose; after move_to_end it
// differs from the order of the dict underneath. The iterator protocol gives it at several times
// the cost of the scan (benchmarks/optree, ResNet module trees), so the list is read directly where
// its layout is the known one of CPython 3.9 to 3.13. This file is the only one that knows it.
//
// `state` counts the changes of the list. As many as there are items were all additions at its end,
// so the list agrees with the dict and its nodes need not be read: 450 of the 2400 cache lines of
// ResNet50's module tree (benchmarks/optree, first visit). That holds unless items went around the
// OrderedDict, by dict.__delitem__ and dict.__setitem__: they leave a hole among the entries, or
// other entries than the list was made for.
#if !defined(PYPY_VERSION) && !defined(Py_GIL_DISABLED) && PY_VERSION_HEX < 0x030E0000
#define OPTREE_ODICT_LIST 1
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
    std::size_t state;
    PyObject* inst_dict;
    PyObject* weakreflist;
};

OPTREE_INLINE bool only_additions(const ListHead& head, std::size_t size) noexcept {
    auto* dict = const_cast<PyDictObject*>(&head.dict);
    return head.state == size && head.resize_sentinel == dict->ma_keys &&
           dict_entries(reinterpret_cast<PyObject*>(dict));
}
#else
#define OPTREE_ODICT_LIST 0
#endif

}  // namespace

// A layout found by the order of the dict underneath is right if the list agrees with it.
KeyLayout* OrderedDict::gather_known([[maybe_unused]] Context& context,
                                     [[maybe_unused]] PyObject* object,
                                     [[maybe_unused]] PyObject** out) noexcept {
#if OPTREE_ODICT_LIST
    if (OPTREE_UNLIKELY(!context.state.odict_fast)) return nullptr;
    KeyLayout* known = optree::gather_known(context.state.layouts(), object, false, out);
    if (OPTREE_UNLIKELY(known == nullptr)) return nullptr;
    const auto* head = reinterpret_cast<ListHead*>(object);
    if (OPTREE_LIKELY(only_additions(*head, known->size))) return known;
    const ListNode* node = head->first;
    for (PyObject *const *key = known->inserted, *const *end = key + known->size; key != end;
         ++key) {
        if (OPTREE_UNLIKELY(node == nullptr || node->key != *key)) return nullptr;
        node = node->next;
    }
    return node == nullptr ? known : nullptr;
#else
    return nullptr;
#endif
}

bool ordereddict_list_is_readable() {
#if OPTREE_ODICT_LIST
    if (PyODict_Type.tp_basicsize != static_cast<Py_ssize_t>(sizeof(ListHead))) return false;
    const Ref trial = checked(PyODict_New());
    for (const char* name : {"a", "b", "c"}) {
        const Ref key = checked(PyUnicode_InternFromString(name));
        check_status(PyODict_SetItem(trial.get(), key.get(), Py_None));
    }
    const auto* head = reinterpret_cast<ListHead*>(trial.get());
    if (head->state != 3 || head->resize_sentinel != head->dict.ma_keys) return false;
    checked(PyObject_CallMethod(trial.get(), "move_to_end", "s", "a"));
    if (head->state != 5) return false;
    const ListNode* node = head->first;
    // Only follow pointers that the dict's own keys vouch for.
    for (const char* name : {"b", "c", "a"}) {
        const Ref key = checked(PyUnicode_InternFromString(name));
        if (node == nullptr || node->key != key.get()) return false;
        node = node->next;
    }
    return node == nullptr;
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
