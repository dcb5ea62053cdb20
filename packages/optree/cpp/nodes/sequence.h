// SPDX-License-Identifier: Apache-2.0
// Code shared by the kinds whose children are contiguous.
#pragma once

#include "cpython/list_items.h"
#include "cpython/tuple_items.h"
#include "nodes/node.h"
#include "support/errors.h"

namespace optree {

inline void drop_children(PyObject** children, std::size_t count) noexcept {
    for (std::size_t i = 0; i < count; ++i) drop(children[i]);
}

// A tuple of new references to `items`.
inline Ref tuple_of(PyObject* const* items, std::size_t count) {
    Ref tuple = checked(PyTuple_New(static_cast<Py_ssize_t>(count)));
    for (std::size_t i = 0; i < count; ++i) tuple_items(tuple.get())[i] = compat::new_ref(items[i]);
    return tuple;
}

// A tuple or list that takes over the references to `children`. On error returns null and drops the
// references.
inline PyObject* steal_into_tuple(PyObject** children, std::size_t count) noexcept {
    PyObject* tuple = new_tuple_of(children, count);
    if (OPTREE_UNLIKELY(tuple == nullptr)) drop_children(children, count);
    return tuple;
}

// An instance of a tuple subclass, created without calling the class.
inline PyObject* steal_into_instance(PyTypeObject* type, PyObject** children,
                                     std::size_t count) noexcept {
    PyObject* made = new_plain_tuple(type, children, count);
    if (OPTREE_UNLIKELY(made == nullptr)) drop_children(children, count);
    return made;
}

inline PyObject* steal_into_list(PyObject** children, std::size_t count) noexcept {
    PyObject* list = new_list_of(children, count);
    if (OPTREE_UNLIKELY(list == nullptr)) drop_children(children, count);
    return list;
}

// Visits the items of a tuple or of an instance of a subclass, which keeps them alive.
template <class Visitor>
OPTREE_INLINE std::uint32_t visit_tuple_items(PyObject* tuple, Visitor& visitor) {
    const std::uint32_t arity = checked_count(static_cast<std::size_t>(PyTuple_GET_SIZE(tuple)));
    visitor.expect(arity);
    PyObject* const* items = tuple_items(tuple);
    for (std::uint32_t i = 0; i < arity; ++i) {
        i += static_cast<std::uint32_t>(visitor.at_once(items + i, arity - i));
        if (i == arity) break;
        visitor.borrowed(items[i]);
    }
    return arity;
}

[[noreturn]] OPTREE_COLD void raise_expected(const char* what, PyObject* got);
[[noreturn]] OPTREE_COLD void raise_arity(const char* kind, const char* label,
                                          std::uint32_t expected, Py_ssize_t got, PyObject* object);

inline Ref index_entry(std::uint32_t index) { return checked(PyLong_FromSize_t(index)); }

// Named tuples and PyStructSequences: the slot is the class, and each child has a field name.
template <class Self>
struct RecordKind : AnyNode {
    static constexpr bool kNamedByClass = true;
    static constexpr bool kStacksChildren = false;
    static bool recognises(State& state, PyTypeObject* type) {
        return PyType_FastSubclass(type, Py_TPFLAGS_TUPLE_SUBCLASS) && Self::is_class(state, type);
    }
    template <class Visitor>
    OPTREE_INLINE static std::uint32_t visit(Context&, PyObject* object, Visitor& visitor,
                                             Ref* slots) {
        slots[0] = Ref::borrow(type_object(Py_TYPE(object)));
        return visit_tuple_items(object, visitor);
    }
    static void match(Context& context, const Slot* slots, std::uint32_t arity, PyObject* object,
                      ObjectStack& children) {
        PyTypeObject* type = Py_TYPE(object);
        const bool same = type_object(type) == as_object(slots[0]);
        Ref alive;
        if (!same) {
            alive = Ref::borrow(type_object(type));  // the check may run Python code
            if (!Self::recognises(context.state, type)) raise_expected(Self::kFamily, object);
        }
        if (PyTuple_GET_SIZE(object) != arity) {
            raise_arity(Self::kName, "tuple", arity, PyTuple_GET_SIZE(object), object);
        }
        if (!same) {
            raise(PyExc_ValueError, "%s type mismatch; expected type: %R, got type: %R; tuple: %R.",
                  Self::kName, as_object(slots[0]), type, object);
        }
        Collect collect(children);
        visit_tuple_items(object, collect);
    }
    static Ref step(const Slot* slots, std::uint32_t child, PyObject* entry) {
        const Ref fields = Self::fields(static_cast<PyTypeObject*>(slots[0]));
        return child < static_cast<std::size_t>(PyTuple_GET_SIZE(fields.get()))
                   ? step_of_field(PyTuple_GET_ITEM(fields.get(), child))
                   : step_of_entry(entry);
    }
    static std::string text(const Slot* slots, const Texts& children) {
        const Ref fields = Self::fields(static_cast<PyTypeObject*>(slots[0]));
        return with_fields(Self::class_text(as_object(slots[0])), fields.get(), children);
    }
    static void verify(const ReadNode& node, const Ref* slots) {
        auto* type = reinterpret_cast<PyTypeObject*>(slots[0].get());
        if (!Self::recognises(node.state, type)) {
            malformed("%R is not a %s class", type, Self::kName);
        }
        if (PyTuple_GET_SIZE(Self::fields(type).get()) != node.arity) {
            malformed("the number of fields does not match the arity");
        }
    }
};

}  // namespace optree
