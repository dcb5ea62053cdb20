// SPDX-License-Identifier: Apache-2.0
// tree_flatten_one_level of tuples, lists and dicts; the Python function does the other kinds, and
// these too where TorchDynamo traces it. Pays for 4x of one-level flatten (benchmarks/optree).
#include "bind/one_level.h"

#include "nodes/context.h"
#include "nodes/dict.h"

namespace optree {
namespace {

Ref indices(Py_ssize_t size) {
    Ref tuple = checked(PyTuple_New(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
        PyTuple_SET_ITEM(tuple.get(), i, index_entry(static_cast<std::uint32_t>(i)).release());
    }
    return tuple;
}

// A list subclass that holds the keys in traversal order, and the dict of the keys as inserted.
Ref metadata_of(const OneLevel& known, KeyLayout* layout) {
    auto* type = reinterpret_cast<PyTypeObject*>(known.metadata_class.get());
    Ref metadata = checked(type->tp_alloc(type, 0));
    const Ref keys = layout_keys(layout);
    check_status(PyList_SetSlice(metadata.get(), 0, 0, keys.get()));
    const Ref inserted = dict_of_keys(layout);
    check_status(PyObject_SetAttr(metadata.get(), known.str_original_keys.get(), inserted.get()));
    return metadata;
}

Ref output_of(const OneLevel& known, const OneLevel::Kind& kind, Ref children, Ref metadata,
              Ref entries) {
    auto* type = reinterpret_cast<PyTypeObject*>(known.output_class.get());
    Ref output = checked(new_plain_tuple(type, 4));
    PyObject** items = tuple_items(output.get());
    items[0] = children.release();
    items[1] = metadata.release();
    items[2] = entries.release();
    items[3] = compat::new_ref(kind.unflatten_func.get());
    const Ref attributes = checked(PyDict_Copy(kind.attributes.get()));
    check_status(PyObject_GenericSetDict(output.get(), attributes.get(), nullptr));
    return output;
}

}  // namespace

void set_one_level(State& state, PyObject* output_class, PyObject* metadata_class,
                   PyObject* const* pairs) {
    const auto is_subclass = [](PyObject* object, unsigned long flag, std::size_t size) {
        if (!PyType_Check(object)) return false;
        auto* type = reinterpret_cast<PyTypeObject*>(object);
        return PyType_HasFeature(type, flag) &&
               static_cast<std::size_t>(type->tp_basicsize) >= size;
    };
    if (!is_subclass(output_class, Py_TPFLAGS_TUPLE_SUBCLASS, sizeof(PyVarObject)) ||
        !is_subclass(metadata_class, Py_TPFLAGS_LIST_SUBCLASS, sizeof(PyListObject))) {
        raise(PyExc_TypeError, "expected subclasses of tuple and list, got %R and %R", output_class,
              metadata_class);
    }
    OneLevel& known = state.one_level;
    for (int i = 0; i < 3; ++i) {
        PyObject* pair = pairs[i];
        if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2 ||
            !PyDict_CheckExact(PyTuple_GET_ITEM(pair, 1))) {
            raise(PyExc_TypeError, "expected (unflatten_func, attributes), got %R", pair);
        }
    }
    // All are right: nothing was changed before.
    for (int i = 0; i < 3; ++i) {
        PyObject* pair = pairs[i];
        known.kinds[i].unflatten_func = Ref::borrow(PyTuple_GET_ITEM(pair, 0));
        known.kinds[i].attributes = Ref::borrow(PyTuple_GET_ITEM(pair, 1));
    }
    known.str_original_keys = checked(PyUnicode_InternFromString("original_keys"));
    known.metadata_class = Ref::borrow(metadata_class);
    known.output_class = Ref::borrow(output_class);
}

Ref flatten_one_level(Context& context, PyObject* tree) {
    const OneLevel& known = context.state.one_level;
    if (!known.output_class) return Ref::borrow(Py_None);
    if (PyTuple_CheckExact(tree) || PyList_CheckExact(tree)) {
        Ref children = checked(PySequence_List(tree));
        Ref entries = indices(PyList_GET_SIZE(children.get()));
        return output_of(known, known.kinds[PyTuple_CheckExact(tree) ? 0 : 1], std::move(children),
                         Ref::borrow(Py_None), std::move(entries));
    }
    if (PyDict_CheckExact(tree) && context.sorted) {
        ObjectStack values;
        const Ref alive = Ref::borrow(tree);
        const Ref owner = scan_mapping<Dict>(context, tree, values);
        KeyLayout* layout = as_layout(owner.get());
        Ref metadata = metadata_of(known, layout);
        Ref entries = tuple_of(layout->keys, layout->size);
        return output_of(known, known.kinds[2], values.into_list(), std::move(metadata),
                         std::move(entries));
    }
    return Ref::borrow(Py_None);
}

}  // namespace optree
