// SPDX-License-Identifier: Apache-2.0
// Plain lists.
#pragma once

#include <algorithm>

#include "nodes/sequence.h"

namespace optree {

struct List : AnyNode {
    static constexpr const char* kName = "list";
    static constexpr bool kStacksChildren = false;
    static constexpr bool kRebuildsQuietly = true;
    static constexpr bool kCopies = OPTREE_LIST_TAKES_ITEMS != 0;
    static Ref find_class() { return Ref::borrow(type_object(&PyList_Type)); }
    static bool is_empty(const State&, PyObject* object) noexcept {
        return PyList_GET_SIZE(object) == 0;
    }
    template <class Visitor>
    OPTREE_INLINE static std::uint32_t visit(Context&, PyObject* list, Visitor& visitor, Ref*) {
        [[maybe_unused]] const typename Visitor::Section reading(list);
        const Py_ssize_t size = PyList_GET_SIZE(list);
        const std::uint32_t arity = checked_count(static_cast<std::size_t>(size));
        visitor.expect(arity);
        for (Py_ssize_t i = 0; i < size; ++i) {
            if constexpr (!compat::kFreeThreaded) {
                // User code may have shrunk the list.
                const Py_ssize_t there = std::min(size, PyList_GET_SIZE(list));
                if (OPTREE_UNLIKELY(i >= there)) raise_shrunk();
                i += static_cast<Py_ssize_t>(
                    visitor.at_once(list_items(list) + i, static_cast<std::size_t>(there - i)));
                if (i == size) break;
                if (OPTREE_UNLIKELY(i == there)) raise_shrunk();
            }
            visitor.owned(compat::kFreeThreaded ? checked(compat::list_item(list, i))
                                                : Ref::borrow(PyList_GET_ITEM(list, i)));
        }
        return arity;
    }
    static PyObject* rebuild(State&, const Slot*, PyObject** children, std::size_t count) {
        return steal_into_list(children, count);
    }
    template <class Find>
    static PyObject* copy(std::size_t count, Find&& find) noexcept {
        return list_takes_items() ? copied_list(count, find) : nullptr;
    }
    static void match(Context& context, const Slot*, std::uint32_t arity, PyObject* object,
                      ObjectStack& children) {
        if (!PyList_CheckExact(object)) raise_expected("list", object);
        Collect collect(children);
        const std::uint32_t count = visit(context, object, collect, nullptr);
        if (count != arity) raise_arity("list", "list", arity, count, object);
    }
    static std::string text(const Slot*, const Texts& children) {
        return "[" + joined(children) + "]";
    }

  private:
    [[noreturn]] OPTREE_COLD static void raise_shrunk() {
        raise(PyExc_IndexError, "list index out of range");
    }
};

}  // namespace optree
