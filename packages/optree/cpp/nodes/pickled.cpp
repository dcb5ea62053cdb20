// SPDX-License-Identifier: Apache-2.0
#include "nodes/pickled.h"

#include <cstdarg>

#include "cpython/list_items.h"
#include "nodes/state.h"

namespace optree {

void malformed(const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    const Ref reason =
        Ref::steal(calling_python([&] { return PyUnicode_FromFormatV(format, args); }));
    va_end(args);
    if (!reason) throw PythonError{};
    raise(PyExc_RuntimeError, "Malformed pickled PyTreeSpec: %U.", reason.get());
}

Py_ssize_t read_integer(PyObject* value, const char* what) {
    if (!PyLong_Check(value)) malformed("%s is not an integer", what);
    const Py_ssize_t number = PyLong_AsSsize_t(value);
    if (number == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        malformed("%s is out of range", what);
    }
    return number;
}

namespace {

// From this many keys on, pickles store the original keys of a dict as a list. This is 1.2x faster
// to dump and 2.4x faster to load than the dict in __getstate__(), which has values and hashes
// (benchmarks/optree, transformer state). The published package reads both. If the list is that of
// the keys in traversal order, pickle writes it once.
constexpr std::uint32_t kManyKeys = 16;

// A list, or the keys of a dict, as a list that no other thread changes.
Ref snapshot(PyObject* list_or_dict) {
    if (!compat::kFreeThreaded && PyList_CheckExact(list_or_dict)) {
        return Ref::borrow(list_or_dict);
    }
    return checked(PySequence_List(list_or_dict));
}

// Collects the keys, which must be hashable and distinct. Hashing may run Python code, which must
// not find a list that it could change.
void collect_checked_keys(PyObject* keys, Py_ssize_t arity, ObjectStack& out) {
    if (!is_sequence(keys)) malformed("the keys of a dictionary node are not a list");
    collect(keys, out);
    if (static_cast<Py_ssize_t>(out.size()) != arity)
        malformed("the number of keys does not match the arity");
    const Ref set = checked(PyDict_New());
    for (std::size_t i = 0; i < out.size(); ++i) {
        if (calling_python([&] { return PyDict_SetItem(set.get(), out[i], Py_None); }) < 0) {
            if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw PythonError{};
            PyErr_Clear();
            malformed("the keys of a dictionary node are not hashable");
        }
    }
    if (PyDict_GET_SIZE(set.get()) != arity)
        malformed("the keys of a dictionary node are not distinct");
}

// The layout if `keys` is a list of sorted str or int and `original` is a list or dict of the same
// objects, as a pickle restores them. Null otherwise.
Ref plain_layout(State& state, PyObject* keys, PyObject* original, Py_ssize_t arity) {
    const auto is_plain = [](PyObject* object) {
        return PyList_CheckExact(object) || PyDict_CheckExact(object);
    };
    if (original == nullptr || !is_plain(original) || !PyList_CheckExact(keys)) return nullptr;
    const Ref sorted = snapshot(keys);
    const Ref inserted = snapshot(original);
    if (PyList_GET_SIZE(sorted.get()) != arity || PyList_GET_SIZE(inserted.get()) != arity) {
        return nullptr;
    }
    return make_layout_of_sorted(state.layout(), list_items(sorted.get()),
                                 list_items(inserted.get()), static_cast<std::size_t>(arity));
}

}  // namespace

Ref read_keys(ReadNode& node, bool with_original) {
    State& state = node.state;
    PyObject* original = with_original ? node.original : nullptr;
    if (Ref plain = plain_layout(state, node.data, original, node.arity)) return plain;
    const auto size = static_cast<std::size_t>(node.arity);
    ObjectStack keys;
    collect_checked_keys(node.data, node.arity, keys);
    if (original == nullptr) return make_layout(state.layout(), keys.data(), size, false);
    if (!PyDict_Check(original) && !is_sequence(original)) {
        malformed("the original keys of a dictionary node are not a dict");
    }
    ObjectStack inserted;
    collect(original, inserted);
    // A subclass may iterate over other keys than it holds.
    if (inserted.size() != size) {
        malformed("the number of original keys does not match the number of keys");
    }
    try {
        return make_layout_with_order(state.layout(), keys.data(), inserted.data(), size);
    } catch (const PythonError&) {
        const bool unknown = PyErr_ExceptionMatches(PyExc_KeyError) != 0;
        if (!unknown && !PyErr_ExceptionMatches(PyExc_TypeError)) throw;
        PyErr_Clear();
        malformed(unknown ? "the original keys do not match the keys"
                          : "the original keys of a dictionary node are not hashable");
    }
}

Ref written_original(KeyLayout* layout, PyObject* keys, bool for_pickle) {
    if (!for_pickle || layout->size < kManyKeys) return dict_of_keys(layout);
    if (layout->position == nullptr) return Ref::borrow(keys);
    Ref list = checked(PyList_New(layout->size));
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        PyList_SET_ITEM(list.get(), i, compat::new_ref(layout->inserted[i]));
    }
    return list;
}

}  // namespace optree
