// SPDX-License-Identifier: Apache-2.0
#include "nodes/layout.h"

#include <algorithm>
#include <cstring>

#include "nodes/dict_entries.h"
#include "nodes/sort_keys.h"
#include "support/errors.h"

namespace optree {
namespace {

void layout_dealloc(PyObject* self) {
    auto* layout = reinterpret_cast<KeyLayout*>(self);
    for (std::uint32_t i = 0; i < layout->size; ++i) Py_XDECREF(layout->inserted[i]);
    PyMem_Free(layout->inserted);
    Py_XDECREF(layout->prototype);
    PyTypeObject* type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

PyType_Slot layout_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(layout_dealloc)},
    {0, nullptr},
};

PyType_Spec layout_spec = {
    "optree._C.KeyLayout",
    sizeof(KeyLayout),
    0,
    static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | compat::kNoInstantiation),
    layout_slots,
};

// One block holds inserted[size], then keys[size] and position[size] when the orders differ.
KeyLayout* new_layout(PyTypeObject* type, std::size_t size, bool permuted) {
    const std::uint32_t count = checked_count(size);
    Ref self = checked(type->tp_alloc(type, 0));
    auto* layout = reinterpret_cast<KeyLayout*>(self.get());
    const std::size_t bytes =
        size * (permuted ? 2 * sizeof(PyObject*) + sizeof(std::uint32_t) : sizeof(PyObject*));
    layout->inserted = static_cast<PyObject**>(PyMem_Malloc(bytes != 0 ? bytes : 1));
    if (layout->inserted == nullptr) throw std::bad_alloc();
    layout->keys = permuted ? layout->inserted + size : layout->inserted;
    layout->position = permuted ? reinterpret_cast<std::uint32_t*>(layout->keys + size) : nullptr;
    std::memset(static_cast<void*>(layout->inserted), 0, bytes);
    layout->size = count;
    return reinterpret_cast<KeyLayout*>(self.release());
}

Ref fill_layout(PyTypeObject* type, PyObject* const* inserted, std::size_t size,
                const std::uint32_t* order, bool sorted) {
    KeyLayout* layout = new_layout(type, size, order != nullptr);
    Ref owner = Ref::steal(reinterpret_cast<PyObject*>(layout));
    layout->atomic = true;
    layout->sorted = sorted;
    for (std::size_t i = 0; i < size; ++i) {
        layout->inserted[i] = compat::new_ref(inserted[i]);
        layout->atomic = layout->atomic && is_atomic(inserted[i]);
    }
    if (order != nullptr) {
        for (std::uint32_t child = 0; child < layout->size; ++child) {
            layout->keys[child] = inserted[order[child]];
            layout->position[order[child]] = child;
        }
    }
    return owner;
}

}  // namespace

KeyLayout* LayoutCache::find(PyObject* const* keys, std::size_t size) noexcept {
    if (size == 0) return reinterpret_cast<KeyLayout*>(empty.get());
    for (KeyLayout* layout : set(keys[0], size, false)) {
        if (layout == nullptr) return nullptr;
        if (layout->size == size && !layout->sorted &&
            std::equal(keys, keys + size, layout->inserted)) {
            return layout;
        }
    }
    return nullptr;
}

void LayoutCache::insert_if_atomic(KeyLayout* layout) noexcept {
    if (!layout->atomic || layout->size == 0 || layout->size > kMaxKeys / 4) return;
    Set& set = this->set(layout->inserted[0], layout->size, layout->sorted);
    if (keys_ + layout->size > kMaxKeys) clear();
    KeyLayout* oldest = set[kWays - 1];
    for (std::size_t way = kWays - 1; way > 0; --way) set[way] = set[way - 1];
    Py_INCREF(reinterpret_cast<PyObject*>(layout));
    set[0] = layout;
    keys_ += layout->size;
    if (oldest != nullptr) {
        keys_ -= oldest->size;
        Py_DECREF(reinterpret_cast<PyObject*>(oldest));
    }
}

void LayoutCache::clear() noexcept {
    for (Set& set : sets_) {
        for (KeyLayout*& layout : set) {
            PyObject* old = reinterpret_cast<PyObject*>(layout);
            layout = nullptr;
            Py_XDECREF(old);
        }
    }
    keys_ = 0;
}

Ref make_layout(PyTypeObject* layout_type, PyObject* const* inserted, std::size_t size,
                bool sorted) {
    std::vector<std::uint32_t> order;
    const bool permuted = sorted && size > 1 && sort_keys(inserted, size, order);
    return fill_layout(layout_type, inserted, size, permuted ? order.data() : nullptr, sorted);
}

Ref make_layout_with_order(PyTypeObject* layout_type, PyObject* keys, PyObject* inserted) {
    const auto size = static_cast<std::size_t>(PyList_GET_SIZE(keys));
    if (PyList_GET_SIZE(inserted) != PyList_GET_SIZE(keys)) {
        raise(PyExc_KeyError, "the two key orders hold different keys");
    }
    Ref index = checked(PyDict_New());
    for (std::size_t i = 0; i < size; ++i) {
        Ref number = checked(PyLong_FromSize_t(i));
        PyObject* key = PyList_GET_ITEM(inserted, static_cast<Py_ssize_t>(i));
        check_status(PyDict_SetItem(index.get(), key, number.get()));
    }
    std::vector<std::uint32_t> order(size);
    std::vector<bool> taken(size, false);  // keys whose __eq__ lies must not make holes
    bool permuted = false;
    for (std::size_t child = 0; child < size; ++child) {
        PyObject* key = PyList_GET_ITEM(keys, static_cast<Py_ssize_t>(child));
        PyObject* number = PyDict_GetItemWithError(index.get(), key);
        if (number == nullptr) {
            if (PyErr_Occurred()) throw PythonError{};
            raise(PyExc_KeyError, "the two key orders hold different keys");
        }
        order[child] = static_cast<std::uint32_t>(PyLong_AsUnsignedLong(number));
        if (taken[order[child]]) {
            raise(PyExc_KeyError, "the two key orders hold different keys");
        }
        taken[order[child]] = true;
        permuted = permuted || order[child] != child;
    }
    PyObject** items = reinterpret_cast<PyListObject*>(inserted)->ob_item;
    return fill_layout(layout_type, items, size, permuted ? order.data() : nullptr, true);
}

namespace {

// Whether the keys of `mapping` are those of `layout` in the same insertion order, the very same
// objects. If so stores the values (borrowed) at `out` in traversal order. `pos` and `value` are
// what PyDict_Next gave for the first item, whose key is known to agree.
OPTREE_INLINE bool match_layout(const KeyLayout* layout, PyObject* mapping, Py_ssize_t pos,
                                PyObject* value, PyObject** out) noexcept {
    PyObject* key = nullptr;
    PyObject* const* expected = layout->inserted;
    const std::uint32_t* position = layout->position;
    const std::uint32_t size = layout->size;
    if (position == nullptr) {
        out[0] = value;
        for (std::uint32_t i = 1; i < size; ++i) {
            PyDict_Next(mapping, &pos, &key, &value);
            if (OPTREE_UNLIKELY(key != expected[i])) return false;
            out[i] = value;
        }
    } else {
        out[position[0]] = value;
        for (std::uint32_t i = 1; i < size; ++i) {
            PyDict_Next(mapping, &pos, &key, &value);
            if (OPTREE_UNLIKELY(key != expected[i])) return false;
            out[position[i]] = value;
        }
    }
    return true;
}

// The same through the entries of the dict.
OPTREE_INLINE bool match_entries(const KeyLayout* layout, const DictEntries& entries,
                                 PyObject** out) noexcept {
    PyObject* const* expected = layout->inserted;
    const std::uint32_t* position = layout->position;
    const std::uint32_t size = layout->size;
    if (position == nullptr) {
        return entries.for_each(size, [&](std::uint32_t i, PyObject* key, PyObject* value) {
            out[i] = value;
            return key == expected[i];
        });
    }
    return entries.for_each(size, [&](std::uint32_t i, PyObject* key, PyObject* value) {
        out[position[i]] = value;
        return key == expected[i];
    });
}

}  // namespace

KeyLayout* gather_known(LayoutCache& cache, PyObject* mapping, bool sorted,
                        PyObject** out) noexcept {
    const auto size = static_cast<std::size_t>(PyDict_GET_SIZE(mapping));
    const DictEntries entries = cache.entries_readable ? dict_entries(mapping) : DictEntries();
    Py_ssize_t pos = 0;
    PyObject* first = nullptr;
    PyObject* value = nullptr;
    if (OPTREE_LIKELY(static_cast<bool>(entries))) {
        first = entries.first_key();
    } else {
        PyDict_Next(mapping, &pos, &first, &value);
    }
    for (KeyLayout* layout : cache.set(first, size, sorted)) {
        if (layout == nullptr) return nullptr;
        if (layout->inserted[0] != first || layout->size != size || layout->sorted != sorted) {
            continue;
        }
        if (OPTREE_LIKELY(static_cast<bool>(entries))
                ? match_entries(layout, entries, out)
                : match_layout(layout, mapping, pos, value, out)) {
            return layout;
        }
    }
    return nullptr;
}

bool push_known_values(const KeyLayout* layout, bool entries_readable, PyObject* mapping,
                       ObjectStack& values) {
    const std::size_t size = layout->size;
    if (size == 0) return true;
    values.reserve(size);
    PyObject** out = values.data() + values.size();
    const DictEntries entries = entries_readable ? dict_entries(mapping) : DictEntries();
    if (OPTREE_LIKELY(static_cast<bool>(entries))) {
        if (!match_entries(layout, entries, out)) return false;
    } else {
        Py_ssize_t pos = 0;
        PyObject* first = nullptr;
        PyObject* value = nullptr;
        PyDict_Next(mapping, &pos, &first, &value);
        if (first != layout->inserted[0] || !match_layout(layout, mapping, pos, value, out))
            return false;
    }
    for (std::size_t i = 0; i < size; ++i) Py_INCREF(out[i]);
    values.adopt(size);
    return true;
}

Ref scan_unknown(LayoutCache& cache, PyTypeObject* layout_type, PyObject* mapping, bool sorted,
                 ObjectStack& values) {
    const auto size = static_cast<std::size_t>(PyDict_GET_SIZE(mapping));
    ObjectStack keys;
    ObjectStack unordered;
    keys.reserve(size);
    unordered.reserve(size);
    Py_ssize_t pos = 0;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    while (PyDict_Next(mapping, &pos, &key, &value)) {
        keys.push(key);
        unordered.push(value);
    }
    Ref owner = make_layout(layout_type, keys.data(), keys.size(), sorted);
    auto* layout = reinterpret_cast<KeyLayout*>(owner.get());
    const std::size_t base = values.extend(keys.size());
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        values[base + layout->child_of(i)] = unordered[i];
    }
    unordered.forget_from(0);
    cache.insert_if_atomic(layout);
    return owner;
}

namespace {

// A dict of the keys, all None, made once a layout.
PyObject* prototype_of(KeyLayout* layout) noexcept {
    if (OPTREE_LIKELY(layout->prototype != nullptr)) return layout->prototype;
    PyObject* prototype = PyDict_New();
    if (prototype == nullptr) return nullptr;
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        if (PyDict_SetItem(prototype, layout->inserted[i], Py_None) < 0) {
            Py_DECREF(prototype);
            return nullptr;
        }
    }
    if (OPTREE_UNLIKELY(layout->prototype != nullptr)) {
        Py_DECREF(prototype);  // a collection's finalizer was here in between
        return layout->prototype;
    }
    return layout->prototype = prototype;
}

}  // namespace

PyObject* new_dict_of(KeyLayout* layout, bool entries_readable, PyObject** children) {
    if (!entries_readable || !layout->atomic || layout->size == 0) {
        return fill_mapping<PyDict_SetItem>(compat::new_dict(layout->size), layout, children);
    }
    // The copy of a dict is one memcpy; nobody has seen it yet, so its values may be put in place.
    PyObject* prototype = prototype_of(layout);
    PyObject* dict = prototype != nullptr ? PyDict_Copy(prototype) : nullptr;
    if (OPTREE_UNLIKELY(dict == nullptr))
        return fill_mapping<PyDict_SetItem>(nullptr, layout, children);
    const DictEntries entries = dict_entries(dict);
    if (OPTREE_UNLIKELY(!entries)) return fill_mapping<PyDict_SetItem>(dict, layout, children);
    const std::uint32_t size = layout->size;
    bool tracked = false;
    const std::uint32_t* position = layout->position;
    entries.for_each(size, [&](std::uint32_t i, PyObject*, PyObject*& value) {
        value = children[position != nullptr ? position[i] : i];
        return true;
    });
    for (std::uint32_t i = 0; i < size && !tracked; ++i) {
        tracked = PyType_IS_GC(Py_TYPE(children[i]));
    }
    compat::drop_none(size);
    if (tracked && PyObject_GC_IsTracked(dict) == 0) PyObject_GC_Track(dict);
    return dict;
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

bool same_keys(const KeyLayout* a, const KeyLayout* b) {
    if (a == b) return true;
    if (a->size != b->size) return false;
    for (std::uint32_t i = 0; i < a->size; ++i) {
        if (!equal(a->keys[i], b->keys[i])) return false;
    }
    return true;
}

Ref make_layout_type() { return internal_class(checked(PyType_FromSpec(&layout_spec))); }

}  // namespace optree
