// SPDX-License-Identifier: Apache-2.0
#include "walk/unflatten.h"

namespace optree {
namespace {

[[noreturn]] OPTREE_COLD void raise_too_few(std::uint32_t expected, Py_ssize_t got) {
    raise(PyExc_ValueError, "Too few leaves for PyTreeSpec; expected: %zd, got: %zd.",
          static_cast<Py_ssize_t>(expected), got);
}

[[noreturn]] OPTREE_COLD void raise_too_many(std::uint32_t expected, const char* got,
                                             Py_ssize_t number) {
    const auto wanted = static_cast<Py_ssize_t>(expected);
    try {
        raise(PyExc_ValueError, "Too many leaves for PyTreeSpec; expected: %zd.", wanted);
    } catch (const PythonError&) {
        add_note("Got %s%zd; pass one object for each of the %zd leaves of the spec.", got, number,
                 wanted);
        throw;
    }
}

// The items of a list or tuple of the right length. User code that runs while containers are
// created may shrink the list, so its size is read again each time.
class ArraySource {
  public:
    static constexpr bool kOwnsRow = false;
    static constexpr bool kLendsRow = true;
    PyObject** row() noexcept { return nullptr; }
    void given(std::uint32_t) noexcept {}
    explicit ArraySource(PyObject* array) : array_(array), is_list_(PyList_CheckExact(array)) {}
    OPTREE_INLINE void take(std::uint32_t count, ObjectStack& stack) {
        const CriticalSection reading(array_);
        const std::size_t size = this->size();
        if (OPTREE_UNLIKELY(size - position_ < count || size < position_)) {
            raise_too_few(checked_count(position_ + count), static_cast<Py_ssize_t>(size));
        }
        PyObject** items = this->items();
        stack.push_all(items + position_, count);
        position_ += count;
        // Prefetches the items that the next node probably takes while this one is created (saves a
        // twentieth of unflatten on small dicts, benchmarks/optree, nested transformer state).
        if (size - position_ >= 2) {
            compat::prefetch(items[position_]);
            compat::prefetch(items[position_ + 1]);
        }
    }

    PyObject* copy(Kind kind, std::uint32_t count) {
        PyObject* made = copy_row(kind, count, [&]() noexcept -> PyObject* const* {
            const bool there = position_ <= size() && size() - position_ >= count;
            return there ? items() + position_ : nullptr;
        });
        if (OPTREE_LIKELY(made != nullptr)) {
            position_ += count;
        } else if (OPTREE_UNLIKELY(PyErr_Occurred() != nullptr)) {
            throw PythonError{};
        }
        return made;
    }

  private:
    std::size_t size() const noexcept {
        return static_cast<std::size_t>(is_list_ ? PyList_GET_SIZE(array_)
                                                 : PyTuple_GET_SIZE(array_));
    }
    PyObject** items() const noexcept {
        return is_list_ ? list_items(array_) : tuple_items(array_);
    }

    PyObject* array_;
    bool is_list_;
    std::size_t position_ = 0;
};

}  // namespace

Ref IteratorSource::next() {
    Ref leaf = next_of(iterator_);
    if (!leaf) {
        if (!counts_) raise(PyExc_ValueError, "Too few leaves for PyTreeSpec.");
        raise_too_few(expected_, got_);
    }
    ++got_;
    return leaf;
}

void IteratorSource::take(std::uint32_t count, ObjectStack& stack) {
    state_.running_python([&] {
        for (std::uint32_t i = 0; i < count; ++i) stack.push_owned(next().release());
    });
}

void IteratorSource::finish() {
    if (!next_of(iterator_)) return;
    if (!counts_) raise(PyExc_ValueError, "Too many leaves for PyTreeSpec.");
    raise_too_many(expected_, "at least ", static_cast<Py_ssize_t>(expected_) + 1);
}

Ref unflatten_iterable(State& state, const TreeView& tree, PyObject* leaves) {
    if (PyList_CheckExact(leaves) || PyTuple_CheckExact(leaves)) {
        const Py_ssize_t size =
            PyList_CheckExact(leaves) ? PyList_GET_SIZE(leaves) : PyTuple_GET_SIZE(leaves);
        if (size < static_cast<Py_ssize_t>(tree.leaves)) raise_too_few(tree.leaves, size);
        if (size > static_cast<Py_ssize_t>(tree.leaves)) raise_too_many(tree.leaves, "", size);
        return unflatten(state, tree, ArraySource(leaves));
    }
    const Ref iterator = checked(PyObject_GetIter(leaves));
    IteratorSource source(state, iterator.get(), tree.leaves, true);
    Ref made = unflatten(state, tree, source);
    source.finish();
    return made;
}

}  // namespace optree
