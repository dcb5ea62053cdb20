// SPDX-License-Identifier: Apache-2.0
// Builds mappings, lists and tuples from layouts.
#include "cpython/dict_table.h"
#include "cpython/odict_list.h"
#include "cpython/trials.h"
#include "nodes/layout.h"
#include "nodes/sequence.h"
#include "nodes/state.h"

namespace optree {
namespace {

// Keeps an object that was made from a layout for the next call. Takes over the reference; the
// result is borrowed.
PyObject* keep(std::atomic<PyObject*>& place, PyObject* made) noexcept {
    PyObject* known = nullptr;
    if (OPTREE_LIKELY(place.compare_exchange_strong(known, made))) return made;
    Py_DECREF(made);  // a finalizer or another thread was first
    return known;
}

OPTREE_NOINLINE PyObject* make_prototype(KeyLayout* layout) noexcept {
    PyObject* prototype = PyDict_New();
    if (prototype == nullptr) return nullptr;
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        if (PyDict_SetItem(prototype, layout->inserted[i], Py_None) < 0) {
            Py_DECREF(prototype);
            return nullptr;
        }
    }
    // Tuple keys make the collector track the dict. It is in no cycle and must stay hidden.
    PyObject_GC_UnTrack(prototype);
    return keep(layout->prototype, prototype);
}

// A dict of the keys with None for each value, made once for each layout.
OPTREE_INLINE PyObject* prototype_of(KeyLayout* layout) noexcept {
    PyObject* known = layout->prototype.load(std::memory_order_acquire);
    return OPTREE_LIKELY(known != nullptr) ? known : make_prototype(layout);
}

// A mapping built item by item.
template <int (*SetItem)(PyObject*, PyObject*, PyObject*)>
OPTREE_NOINLINE PyObject* filled(State& state, PyObject* (*make)(Py_ssize_t), KeyLayout* layout,
                                 PyObject** children) {
    return state.running_python(
        [&] { return fill_mapping<SetItem>(make(layout->size), layout, children); });
}

PyObject* new_ordered_dict(Py_ssize_t) { return PyODict_New(); }

}  // namespace

PyObject* new_dict_of(State& state, KeyLayout* layout, PyObject** children) {
    if (OPTREE_UNLIKELY(layout->size == 0)) return PyDict_New();
    if (OPTREE_UNLIKELY(!trials.dict_table.held() || !layout->atomic)) {
        return filled<PyDict_SetItem>(state, compat::new_dict, layout, children);
    }
    PyObject* prototype = prototype_of(layout);
    const std::uint32_t* position = layout->position;
    const auto child_of = [&](std::uint32_t i) {
        return children[position != nullptr ? position[i] : i];
    };
    PyObject* made = prototype != nullptr ? dict_like(prototype, layout->size, child_of) : nullptr;
    if (OPTREE_UNLIKELY(made == nullptr)) drop_children(children, layout->size);
    return made;
}

PyObject* new_ordered_dict_of(State& state, KeyLayout* layout, PyObject** children) {
    if (OPTREE_UNLIKELY(layout->size == 0)) return PyODict_New();
    const bool copies = odict_list_is_writable() && layout->atomic;
    PyObject* prototype = copies ? prototype_of(layout) : nullptr;
    // A duplicate key: the OrderedDict was changed through methods of dict.
    const bool repeats = prototype != nullptr && PyDict_GET_SIZE(prototype) != layout->size;
    if (OPTREE_UNLIKELY(!copies || repeats)) {
        return filled<PyODict_SetItem>(state, new_ordered_dict, layout, children);
    }
    const auto child_of = [&](std::uint32_t i) { return children[layout->child_of(i)]; };
    PyObject* made = prototype != nullptr ? odict_like(prototype, layout->size, child_of) : nullptr;
    if (OPTREE_UNLIKELY(made == nullptr)) drop_children(children, layout->size);
    return made;
}

Ref dict_of_keys(KeyLayout* layout) {
    if (layout->atomic) {
        PyObject* prototype = prototype_of(layout);
        if (OPTREE_UNLIKELY(prototype == nullptr)) throw PythonError{};
        return checked(PyDict_Copy(prototype));
    }
    Ref dict = checked(PyDict_New());
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        set_item(dict.get(), layout->inserted[i], Py_None);
    }
    return dict;
}

Ref layout_keys(const KeyLayout* layout) {
    Ref list = checked(PyList_New(layout->size));
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        PyList_SET_ITEM(list.get(), i, compat::new_ref(layout->keys[i]));
    }
    return list;
}

Ref layout_entries(KeyLayout* layout) {
    PyObject* entries = layout->entries.load(std::memory_order_acquire);
    if (OPTREE_UNLIKELY(entries == nullptr)) {
        Ref made = tuple_of(layout->keys, layout->size);
        if (!layout->atomic) return made;  // the collector assumes that a layout never changes
        entries = keep(layout->entries, made.release());
    }
    return Ref::borrow(entries);
}

}  // namespace optree
