// SPDX-License-Identifier: Apache-2.0
#include "walk/map.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "walk/flatten_up_to.h"
#include "walk/unflatten.h"

namespace optree {
namespace {

// Calls func(leaf of the first tree, corresponding objects of the others) for each leaf.
class Calls {
  public:
    Calls(PyObject* func, ObjectStack& columns, std::uint32_t leaves, std::size_t trees)
        : func_(func),
          call_(PyVectorcall_Function(func)),
          columns_(columns),
          leaves_(leaves),
          trees_(trees) {
        if (trees + 1 > kInline) args_heap_.resize(trees + 1);
        args_ = trees + 1 > kInline ? args_heap_.data() : args_inline_;
        args_[0] = nullptr;
    }

    OPTREE_INLINE PyObject* call(std::uint32_t leaf) {
        PyObject** args = args_ + 1;
        args[0] = columns_[leaf];
        for (std::size_t t = 1; t < trees_; ++t) args[t] = columns_[t * leaves_ + leaf];
        const std::size_t flags = trees_ | PY_VECTORCALL_ARGUMENTS_OFFSET;
        // The vectorcall slot is looked up once. PyObject_Vectorcall checks the result of a C
        // function (NULL without an exception, for example), so this code must do the same.
        PyObject* result = calling_python([&] {
            return OPTREE_LIKELY(call_ != nullptr)
                       ? call_(func_, args, flags, nullptr)
                       : PyObject_Vectorcall(func_, args, flags, nullptr);
        });
        if (OPTREE_UNLIKELY(result == nullptr)) raise_from_call();
        return result;
    }

    // Replaces the leaves of the first tree by the results.
    void run() {
        for (std::uint32_t leaf = 0; leaf != leaves_; ++leaf) {
            PyObject* result = call(leaf);
            drop(std::exchange(columns_[leaf], result));
        }
    }

  private:
    [[noreturn]] OPTREE_COLD void raise_from_call() const {
        if (!PyErr_Occurred()) {
            raise(PyExc_SystemError, "%R returned NULL without setting an exception", func_);
        }
        throw PythonError{};
    }

    static constexpr std::size_t kInline = 8;
    PyObject* func_;
    vectorcallfunc call_;
    ObjectStack& columns_;
    std::uint32_t leaves_;
    std::size_t trees_;
    PyObject** args_;
    PyObject* args_inline_[kInline];
    Stack<PyObject*> args_heap_;
};

// Yields the first objects of a stack in order and hands them over.
class RowSource {
  public:
    static constexpr bool kOwnsRow = true;
    static constexpr bool kLendsRow = false;
    explicit RowSource(ObjectStack& owner) : next_(owner.data()) {}
    RowSource(const RowSource&) = delete;
    RowSource& operator=(const RowSource&) = delete;

    PyObject** row() noexcept { return next_; }
    // The owner must forget them.
    void given(std::uint32_t count) noexcept {
        std::memset(static_cast<void*>(next_), 0, count * sizeof(PyObject*));
        next_ += count;
    }
    OPTREE_INLINE void take(std::uint32_t count, ObjectStack& stack) {
        stack.reserve(count);
        std::copy_n(next_, count, stack.data() + stack.size());
        stack.adopt(count);
        given(count);
    }

  private:
    PyObject** next_;
};

std::size_t read_all(Context& context, Flattening& flat, PyObject* tree, PyObject* rests) {
    flat.run(tree);
    const Py_ssize_t count = PyTuple_GET_SIZE(rests);
    for (Py_ssize_t i = 0; i < count; ++i) {
        flatten_up_to(context, flat.view(), PyTuple_GET_ITEM(rests, i), flat.leaves);
    }
    return static_cast<std::size_t>(count) + 1;
}

}  // namespace

Ref tree_map(Context& context, PyObject* func, PyObject* tree, PyObject* rests) {
    Flattening flat(context);
    const std::size_t trees = read_all(context, flat, tree, rests);
    const TreeView view = flat.view();
    Calls(func, flat.leaves, view.leaves, trees).run();
    return unflatten(context.state, view, RowSource(flat.leaves));
}

Ref call_rows(PyObject* func, PyObject* columns) {
    ObjectStack table;
    Py_ssize_t trees = 0;
    Py_ssize_t rows = 0;
    for (; PyList_Check(columns) && trees < PyList_GET_SIZE(columns); ++trees) {
        PyObject* column = PyList_GET_ITEM(columns, trees);
        if (!PyList_Check(column)) break;
        if (trees == 0) rows = PyList_GET_SIZE(column);
        if (PyList_GET_SIZE(column) != rows) break;
        for (Py_ssize_t i = 0; i < rows; ++i) {
            table.push_owned(checked(compat::list_item(column, i)).release());
        }
    }
    if (!PyList_Check(columns) || trees == 0 || trees != PyList_GET_SIZE(columns)) {
        raise(PyExc_ValueError, "expected a list of lists of equal lengths, got %R", columns);
    }
    Calls(func, table, checked_count(static_cast<std::size_t>(rows)),
          static_cast<std::size_t>(trees))
        .run();
    table.drop_from(static_cast<std::size_t>(rows));
    return table.into_list();
}

void tree_map_inplace(Context& context, PyObject* func, PyObject* tree, PyObject* rests) {
    Flattening flat(context);
    const std::size_t trees = read_all(context, flat, tree, rests);
    const TreeView view = flat.view();
    Calls calls(func, flat.leaves, view.leaves, trees);
    for (std::uint32_t i = 0; i < view.leaves; ++i) drop(calls.call(i));
}

}  // namespace optree
