// SPDX-License-Identifier: Apache-2.0
// A growing array of owned references that starts on the C stack.
#pragma once

#include "cpython/list_items.h"
#include "cpython/tuple_items.h"
#include "support/ref.h"
#include "support/scratch.h"

namespace optree {

// Slots may be null (already handed over). Destroying the stack drops the references that it still
// owns, which may run Python code.
class ObjectStack {
  public:
    ObjectStack() noexcept = default;
    ObjectStack(BlockPool& pool, BlockPool::Use use) noexcept : items_(pool, use) {}
    ~ObjectStack() { clear(); }

    std::size_t size() const noexcept { return items_.size(); }
    bool empty() const noexcept { return items_.size() == 0; }
    PyObject** data() noexcept { return items_.data(); }
    PyObject*& operator[](std::size_t index) noexcept { return items_[index]; }

    void reserve(std::size_t extra) { items_.reserve(extra); }
    // The address for new references, which `adopt` then takes over.
    OPTREE_INLINE PyObject** room(std::size_t count) {
        items_.reserve(count);
        return items_.end();
    }
    OPTREE_INLINE void push_owned(PyObject* object) {
        try {
            items_.push(object);
        } catch (...) {
            drop(object);
            throw;
        }
    }
    OPTREE_INLINE void push(PyObject* object) {
        Py_INCREF(object);
        push_owned(object);
    }
    // The caller must have reserved room.
    OPTREE_INLINE void push_unchecked(PyObject* object) noexcept {
        Py_INCREF(object);
        items_.push_unchecked(object);
    }
    OPTREE_INLINE void push_owned_unchecked(PyObject* object) noexcept {
        items_.push_unchecked(object);
    }
    // Pushes objects until `wanted(object)` is false and returns their number. The size is written
    // once: writing it for each object makes the processor wait (a fifth of flatten on namedtuples,
    // benchmarks/optree).
    template <class Wanted>
    OPTREE_INLINE std::size_t push_while(PyObject* const* objects, std::size_t count,
                                         Wanted&& wanted) {
        reserve(count);
        PyObject** out = items_.end();
        std::size_t pushed = 0;
        for (; pushed < count; ++pushed) {
            PyObject* object = objects[pushed];
            if (OPTREE_UNLIKELY(!wanted(object))) break;
            Py_INCREF(object);
            out[pushed] = object;
        }
        items_.set_size(items_.size() + pushed);
        return pushed;
    }
    OPTREE_INLINE void push_all(PyObject* const* objects, std::size_t count) {
        push_while(objects, count, [](PyObject*) { return true; });
    }
    // Appends `count` null slots and returns the index of the first.
    std::size_t extend(std::size_t count) {
        reserve(count);
        const std::size_t base = size();
        std::memset(static_cast<void*>(data() + base), 0, count * sizeof(PyObject*));
        items_.set_size(base + count);
        return base;
    }
    // Takes over `count` references that were written after the end. The caller must have reserved
    // room.
    void adopt(std::size_t count) noexcept { items_.set_size(size() + count); }
    PyObject* pop() noexcept { return items_.pop(); }
    // Removes the slots from `size` on, whose references were handed over.
    void forget_from(std::size_t size) noexcept { items_.set_size(size); }
    // Drops the references from `size` on.
    void drop_from(std::size_t size) noexcept {
        while (items_.size() > size) xdrop(items_.pop());
    }
    void clear() noexcept { drop_from(0); }

    // Hands all references over to a new list.
    Ref into_list() {
        const auto count = static_cast<Py_ssize_t>(size());
        if (list_takes_items() && count != 0) {
            Ref list = checked(PyList_New(0));
            PyObject** items = items_.detach();
            if (OPTREE_UNLIKELY(items == nullptr)) throw std::bad_alloc();
            give_items(list.get(), items, count);
            return list;
        }
        Ref list = checked(new_list_of(data(), size()));
        forget_from(0);
        return list;
    }

    // Hands all references over to a new tuple.
    Ref into_tuple() {
        Ref tuple = checked(new_tuple_of(data(), size()));
        forget_from(0);
        return tuple;
    }

  private:
    Scratch<PyObject*, 64> items_;
};

// Pushes the items of an iterable.
inline void collect(PyObject* iterable, ObjectStack& items) {
    const Ref iterator = iterator_of(iterable);
    while (Ref item = next_of(iterator.get())) items.push_owned(item.release());
}

// Like PySequence_Tuple, but Python code cannot see a partly filled tuple.
inline Ref collected_tuple(PyObject* iterable) {
    if (PyTuple_CheckExact(iterable)) return Ref::borrow(iterable);
    ObjectStack items;
    collect(iterable, items);
    return items.into_tuple();
}

}  // namespace optree
