// SPDX-License-Identifier: Apache-2.0
// Dead objects of one class whose memory the next ones of the class take over.
#pragma once

#include "support/compat.h"

namespace optree {

// As CPython does for tuples and lists. Pays for a quarter of flatten on small trees
// (benchmarks/optree, tuple of 3). For classes with the garbage collector's header, of fixed size.
class ObjectPool {
  public:
    ObjectPool() = default;
    ObjectPool(const ObjectPool&) = delete;
    ObjectPool& operator=(const ObjectPool&) = delete;
    ~ObjectPool() { clear(); }

    // A new instance of `type`, untracked, its members as the last owner left them; null if the
    // pool is empty.
    OPTREE_INLINE PyObject* take(PyTypeObject* type) noexcept {
        return count_ != 0 ? PyObject_Init(objects_[--count_], type) : nullptr;
    }
    // Keeps the memory of an untracked object without references; false if there is no room. The
    // caller still drops the object's reference to its class.
    OPTREE_INLINE bool give(PyObject* object) noexcept {
        if (count_ == kSize) return false;
        objects_[count_++] = object;
        return true;
    }
    void clear() noexcept {
        while (count_ != 0) PyObject_GC_Del(objects_[--count_]);
    }

  private:
    // Guarded by the interpreter lock. A sanitizer sees more where nothing is kept, and a build that
    // lists all objects must be told of each.
#if defined(Py_GIL_DISABLED) || defined(__SANITIZE_ADDRESS__) || defined(Py_TRACE_REFS) || \
    defined(PYPY_VERSION)
    static constexpr unsigned kSize = 0;
    PyObject* objects_[1];
#else
    static constexpr unsigned kSize = 32;
    PyObject* objects_[kSize];
#endif
    unsigned count_ = 0;
};

}  // namespace optree
