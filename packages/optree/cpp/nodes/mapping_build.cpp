// SPDX-License-Identifier: Apache-2.0
// From layouts to mappings, lists and tuples.
#include "cpython/dict_table.h"
#include "cpython/odict_list.h"
#include "cpython/trials.h"
#include "nodes/layout.h"
#include "nodes/sequence.h"

namespace optree {
namespace {

// Keeps what was made of a layout (taking over the reference) for the next time. Borrowed.
PyObject* keep(std::atomic<PyObject*>& place, PyObject* made) noexcept {
    PyObject* known = nullptr;
    if (OPTREE_LIKELY(place.compare_exchange_strong(known, made))) return made;
    Py_DECREF(made);  // a collection's finalizer, or another thread, was faster
    return known;
}

// A dict of the keys, all None, made once a layout.
PyObject* prototype_of(KeyLayout* layout) noexcept {
    PyObject* known = layout->prototype.load(std::memory_order_acquire);
    if (OPTREE_LIKELY(known != nullptr)) return known;
    PyObject* prototype = PyDict_New();
    if (prototype == nullptr) return nullptr;
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        if (PyDict_SetItem(prototype, layout->inserted[i], Py_None) < 0) {
            Py_DECREF(prototype);
            return nullptr;
        }
    }
    // Keys that are tuples make the collector track it. It is in no cycle, and has to stay hidden.
    PyObject_GC_UnTrack(prototype);
    return keep(layout->prototype, prototype);
}

}  // namespace

PyObject* new_dict_of(KeyLayout* layout, PyObject** children) {
    if (!trials.dict_table.held() || !layout->atomic || layout->size == 0) {
        return fill_mapping<PyDict_SetItem>(compat::new_dict(layout->size), layout, children);
    }
    PyObject* prototype = prototype_of(layout);
    const std::uint32_t* position = layout->position;
    const auto child_of = [&](std::uint32_t i) {
        return children[position != nullptr ? position[i] : i];
    };
    PyObject* dict = prototype != nullptr ? dict_like(prototype, layout->size, child_of) : nullptr;
    if (OPTREE_LIKELY(dict != nullptr)) return dict;
    return fill_mapping<PyDict_SetItem>(nullptr, layout, children);
}

PyObject* new_ordered_dict_of(KeyLayout* layout, PyObject** children) {
    if (!odict_list_is_writable() || !layout->atomic || layout->size == 0) {
        return fill_mapping<PyODict_SetItem>(PyODict_New(), layout, children);
    }
    PyObject* prototype = prototype_of(layout);
    if (OPTREE_UNLIKELY(prototype != nullptr && PyDict_GET_SIZE(prototype) != layout->size)) {
        // A duplicate key: the OrderedDict was changed through dict methods.
        return fill_mapping<PyODict_SetItem>(PyODict_New(), layout, children);
    }
    const auto child_of = [&](std::uint32_t i) { return children[layout->child_of(i)]; };
    PyObject* made = prototype != nullptr ? odict_like(prototype, layout->size, child_of) : nullptr;
    if (OPTREE_LIKELY(made != nullptr)) return made;
    return fill_mapping<PyODict_SetItem>(nullptr, layout, children);
}

Ref dict_of_keys(KeyLayout* layout) {
    if (layout->atomic) {
        PyObject* prototype = prototype_of(layout);
        if (OPTREE_UNLIKELY(prototype == nullptr)) throw PythonError{};
        return checked(PyDict_Copy(prototype));
    }
    Ref dict = checked(PyDict_New());
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        check_status(PyDict_SetItem(dict.get(), layout->inserted[i], Py_None));
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
        if (!layout->atomic) return made;  // a layout never changes for the collector
        entries = keep(layout->entries, made.release());
    }
    return Ref::borrow(entries);
}

}  // namespace optree
