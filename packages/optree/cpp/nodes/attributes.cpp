// SPDX-License-Identifier: Apache-2.0
#include "nodes/attributes.h"

#include "cpython/calling.h"
#include "cpython/code.h"

namespace optree {
namespace {

std::size_t size_of(const Ref& tuple) noexcept {
    return static_cast<std::size_t>(PyTuple_GET_SIZE(tuple.get()));
}

Ref names_from(PyObject* tuple) {
    if (!PyTuple_CheckExact(tuple)) raise(PyExc_TypeError, "expected a tuple, got %R", tuple);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
        if (!PyUnicode_CheckExact(PyTuple_GET_ITEM(tuple, i))) {
            raise(PyExc_TypeError, "expected a tuple of str, got %R", tuple);
        }
    }
    return Ref::borrow(tuple);
}

// The value of a (name, value) pair of the metadata.
PyObject* value_at(PyObject* node_metadata, std::size_t index) noexcept {
    return tuple_items(tuple_items(node_metadata)[index])[1];
}

}  // namespace

std::unique_ptr<Attributes> Attributes::parse(PyObject* description) {
    if (!PyTuple_CheckExact(description) || PyTuple_GET_SIZE(description) != 6) {
        raise(PyExc_TypeError, "expected a tuple of 6, got %R", description);
    }
    PyObject** items = tuple_items(description);
    auto made = std::make_unique<Attributes>();
    made->children = names_from(items[0]);
    made->metadata = names_from(items[1]);
    made->parameters = names_from(items[2]);
    const std::size_t count = size_of(made->children) + size_of(made->metadata);
    if (size_of(made->parameters) != count || !PyTuple_CheckExact(items[3])) {
        raise(PyExc_ValueError, "expected %zd parameters and an order, got %R and %R",
              static_cast<Py_ssize_t>(count), items[2], items[3]);
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[3]); ++i) {
        const std::size_t index = PyLong_AsSize_t(PyTuple_GET_ITEM(items[3], i));
        if (PyErr_Occurred()) throw PythonError{};
        if (index >= count) raise(PyExc_IndexError, "no attribute %R", items[3]);
        made->order.push_back(static_cast<std::uint32_t>(index));
    }
    if (items[4] != Py_None) made->is_plain = Ref::borrow(items[4]);
    if (items[5] != Py_None) made->placeholder = Ref::borrow(items[5]);
    made->str_init = checked(PyUnicode_InternFromString("__init__"));
    return made;
}

std::uint32_t Attributes::expand(PyObject* object, ObjectStack& out, Ref* slots) const {
    const auto get = [&](PyObject* name) {
        return checked(calling_python([&] { return PyObject_GetAttr(object, name); }));
    };
    const std::size_t count = size_of(children);
    for (std::size_t i = 0; i < count; ++i) {
        out.push_owned(get(tuple_items(children.get())[i]).release());
    }
    ObjectStack pairs;  // a property may run, which must not see a half-filled tuple
    for (std::size_t i = 0; i < size_of(metadata); ++i) {
        PyObject* its_name = tuple_items(metadata.get())[i];
        const Ref value = get(its_name);
        PyObject* pair[] = {its_name, value.get()};
        pairs.push_owned(tuple_of(pair, 2).release());
    }
    slots[1] = pairs.into_tuple();
    slots[2] = Ref::borrow(children.get());
    return checked_count(count);
}

bool Attributes::fits(PyObject* node_metadata, std::size_t count) const noexcept {
    if (count != size_of(children) || !PyTuple_CheckExact(node_metadata) ||
        PyTuple_GET_SIZE(node_metadata) != PyTuple_GET_SIZE(metadata.get())) {
        return false;
    }
    for (std::size_t i = 0; i < size_of(metadata); ++i) {
        PyObject* pair = tuple_items(node_metadata)[i];
        if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2) return false;
        PyObject* its_name = tuple_items(pair)[0];
        PyObject* expected = tuple_items(metadata.get())[i];
        if (its_name != expected &&
            (!PyUnicode_CheckExact(its_name) || PyUnicode_Compare(its_name, expected) != 0)) {
            return false;
        }
    }
    return true;
}

namespace {

// The contents of the closure cells of a function as a tuple; None for an empty cell.
Ref contents_of_closure(PyObject* function) {
    ObjectStack contents;
    for (Py_ssize_t i = 0; i < size_of_closure(function); ++i) {
        PyObject* held = held_by_closure(function, i);
        contents.push(held != nullptr ? held : Py_None);
    }
    return contents.into_tuple();
}

}  // namespace

bool PlainInit::holds(PyTypeObject* cls, PyObject* function) const noexcept {
    if (cls->tp_new != PyBaseObject_Type.tp_new || cls->tp_init != tp_init) return false;
    if (function == nullptr || !PyFunction_Check(function) || code_of(function) != code.get()) {
        return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(cells.get()); ++i) {
        if (held_by_closure(function, i) != PyTuple_GET_ITEM(cells.get(), i)) return false;
    }
    return true;
}

int Attributes::traverse(visitproc visit, void* arg) const {
    Py_VISIT(is_plain.get());
    Py_VISIT(plain.peek().cells.get());
    return 0;
}

bool Attributes::makes_plainly(PyTypeObject* cls) {
    if (!is_plain || !calls_plainly(Py_TYPE(cls))) return false;
    const unsigned int version = compat::type_version(cls);
    // With the interpreter lock the function is read from the weak reference. Without the lock
    // another thread may drop it at any time, and the section may not own it: destroying it would
    // run Python code.
    Ref asked;
    if (compat::kFreeThreaded) {
        asked = attribute_of(reinterpret_cast<PyObject*>(cls), str_init.get());
    }
    {
        const ReaderSection section;
        const PlainInit& known = plain.peek();
        if (OPTREE_LIKELY(known.version == version && version != 0)) {
            return known.yes &&
                   known.holds(cls,
                               compat::kFreeThreaded ? asked.get() : target_of(known.init.get()));
        }
    }
    return decide(cls);
}

bool Attributes::decide(PyTypeObject* cls) {
    PyObject* cls_object = reinterpret_cast<PyObject*>(cls);
    auto made = std::make_unique<PlainInit>();
    // A look-up assigns a version to the class if it has none.
    const Ref init = attribute_of(cls_object, str_init.get());
    made->version = compat::type_version(cls);
    made->tp_init = cls->tp_init;
    if (PyFunction_Check(init.get())) {
        made->init = checked(PyWeakref_NewRef(init.get(), nullptr));
        made->code = Ref::borrow(code_of(init.get()));
        made->cells = contents_of_closure(init.get());
        const Ref answer = checked(
            calling_python([&] { return PyObject_CallOneArg(is_plain.get(), cls_object); }));
        // If the class changed since the look-up, either the version differs or `holds` fails.
        made->yes = answer.get() == Py_True && made->version == compat::type_version(cls) &&
                    made->holds(cls, init.get());
    }
    const bool yes = made->yes;
    if (made->version == 0) return yes;
    std::unique_ptr<PlainInit> dropped;  // dropped after the lock is released
    const WriterLock writing(lock);
    dropped = plain.publish(std::move(made));
    return yes;
}

bool Attributes::has_placeholder(PyObject* node_metadata, PyObject* const* items) const noexcept {
    const std::size_t count = size_of(children);
    for (std::size_t i = 0; i < count; ++i) {
        if (items[i] == placeholder.get()) return true;
    }
    for (std::size_t i = 0; i < size_of(metadata); ++i) {
        if (value_at(node_metadata, i) == placeholder.get()) return true;
    }
    return false;
}

PyObject* Attributes::make_plainly(PyTypeObject* cls, PyObject* node_metadata,
                                   PyObject* const* items) const {
    const Ref no_arguments = checked(PyTuple_New(0));
    Ref made = checked(cls->tp_new(cls, no_arguments.get(), nullptr));
    const std::size_t count = size_of(children);
    for (const std::uint32_t index : order) {
        PyObject* value = index < count ? items[index] : value_at(node_metadata, index - count);
        check_status(calling_python(
            [&] { return PyObject_GenericSetAttr(made.get(), name(index), value); }));
    }
    return made.release();
}

PyObject* Attributes::rebuild(PyTypeObject* cls, PyObject* node_metadata, PyObject** items,
                              std::size_t count) {
    PyObject* made = nullptr;
    try {
        if (makes_plainly(cls) && (!placeholder || !has_placeholder(node_metadata, items))) {
            made = make_plainly(cls, node_metadata, items);
        } else {
            Scratch<PyObject*, 16> values;
            values.reserve(size_of(parameters) + 1);
            values.push_unchecked(nullptr);
            for (std::size_t i = 0; i < count; ++i) values.push_unchecked(items[i]);
            for (std::size_t i = 0; i < size_of(metadata); ++i) {
                values.push_unchecked(value_at(node_metadata, i));
            }
            made = calling_python([&] {
                return PyObject_Vectorcall(reinterpret_cast<PyObject*>(cls), values.data() + 1,
                                           PY_VECTORCALL_ARGUMENTS_OFFSET, parameters.get());
            });
        }
    } catch (const PythonError&) {
        made = nullptr;
    }
    drop_children(items, count);
    return made;
}

}  // namespace optree
