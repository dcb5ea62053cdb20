// SPDX-License-Identifier: Apache-2.0
#include "nodes/custom.h"

#include "nodes/attributes.h"

namespace optree {
namespace {

// Adds a note to Python's own message: what a flatten function must return.
OPTREE_COLD void require_iterable(PyObject* type, PyObject* result) {
    try {
        static_cast<void>(iterator_of(result));
    } catch (const PythonError&) {
        add_note(
            "Expected the flatten function of %R to return (children, metadata) or (children, "
            "metadata, entries), got %R.",
            type, Py_TYPE(result));
        throw;
    }
}

}  // namespace

std::uint32_t Custom::expand(PyObject* object, ObjectStack& children, Ref* slots) {
    auto* registration = as_registration(slots[0].get());
    if (registration->attributes != nullptr) {
        return registration->attributes->expand(object, children, slots);
    }
    const Ref result = checked(
        calling_python([&] { return PyObject_CallOneArg(registration->flatten_func, object); }));
    if (OPTREE_UNLIKELY(Py_TYPE(result.get())->tp_iter == nullptr)) {
        require_iterable(registration->type, result.get());
    }
    const Ref parts = collected_tuple(result.get());
    const Py_ssize_t count = PyTuple_GET_SIZE(parts.get());
    if (count != 2 && count != 3) {
        raise(PyExc_RuntimeError,
              "PyTree custom flatten function for type %R should return a 2- or 3-tuple, got %zd.",
              registration->type, count);
    }
    slots[1] = Ref::borrow(PyTuple_GET_ITEM(parts.get(), 1));
    if (count == 3 && PyTuple_GET_ITEM(parts.get(), 2) != Py_None) {
        slots[2] = collected_tuple(PyTuple_GET_ITEM(parts.get(), 2));
    }
    const std::size_t base = children.size();
    collect(PyTuple_GET_ITEM(parts.get(), 0), children);
    const std::uint32_t arity = checked_count(children.size() - base);
    if (slots[2] && PyTuple_GET_SIZE(slots[2].get()) != arity) {
        raise(PyExc_RuntimeError,
              "PyTree custom flatten function for type %R returned inconsistent number of children "
              "(%zd) and number of entries (%zd).",
              registration->type, static_cast<Py_ssize_t>(arity), PyTuple_GET_SIZE(slots[2].get()));
    }
    return arity;
}

PyObject* Custom::rebuild(State&, const Slot* slots, PyObject** children, std::size_t count) {
    auto* registration = as_registration(slots[0]);
    Attributes* attributes = registration->attributes;
    if (attributes != nullptr && attributes->fits(as_object(slots[1]), count)) {
        return attributes->rebuild(reinterpret_cast<PyTypeObject*>(registration->type),
                                   as_object(slots[1]), children, count);
    }
    PyObject* items = steal_into_tuple(children, count);
    if (items == nullptr) return nullptr;
    PyObject* args[] = {nullptr, as_object(slots[1]), items};
    PyObject* made = calling_python([&] {
        return PyObject_Vectorcall(registration->unflatten_func, args + 1,
                                   2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
    });
    drop(items);
    return made;
}

void Custom::match(Context& context, const Slot* slots, std::uint32_t arity, PyObject* object,
                   ObjectStack& children) {
    auto* expected = as_registration(slots[0]);
    Ref found = context.lookup(Py_TYPE(object));
    if (found.get() != as_object(slots[0])) {
        raise(PyExc_ValueError,
              "Custom node type mismatch; expected type: %R, got type: %R; value: %R.",
              expected->type, Py_TYPE(object), object);
    }
    Ref its[3];
    its[0] = std::move(found);
    const std::uint32_t got = expand(object, children, its);
    if (!equal(as_object(slots[1]), its[1].get())) {
        raise(PyExc_ValueError, "Mismatch custom node data; expected: %R, got: %R; value: %R.",
              as_object(slots[1]), its[1].get(), object);
    }
    if (got != arity) {
        raise(PyExc_ValueError, "Custom type arity mismatch; expected: %zd, got: %zd; value: %R.",
              static_cast<Py_ssize_t>(arity), static_cast<Py_ssize_t>(got), object);
    }
}

Ref Custom::step(const Slot*, std::uint32_t, PyObject* entry) {
    const bool is_name = PyUnicode_CheckExact(entry) && PyUnicode_IsIdentifier(entry) == 1;
    return is_name ? step_of_field(entry) : step_of_entry(entry);
}

std::string Custom::text(const Slot* slots, const Texts& children) {
    return "CustomTreeNode(" + attribute_text(as_registration(slots[0])->type, "__name__") + "[" +
           repr_of(as_object(slots[1])) + "], [" + joined(children) + "])";
}

}  // namespace optree
