// SPDX-License-Identifier: Apache-2.0
// Memory under the garbage collector: that of a dead object can be kept, header
// included, for the next object of the class.
#pragma once

#include "cpython/trials.h"

namespace optree {

// Whether memory is cached between calls, guarded by the interpreter lock. Sanitizers find more
// where nothing is cached.
#if defined(Py_GIL_DISABLED) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kKeepsMemory = false;
#else
inline constexpr bool kKeepsMemory = true;
#endif
// Whether dead objects are cached: a build that lists all objects has to see each allocation.
#if defined(Py_TRACE_REFS) || defined(PYPY_VERSION)
inline constexpr bool kKeepsObjects = false;
#else
inline constexpr bool kKeepsObjects = kKeepsMemory;
#endif

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
        if (!kKeepsObjects || count_ == kSize) return false;
        if (OPTREE_UNLIKELY(!trials.gc_memory.held())) return false;
        objects_[count_++] = object;
        return true;
    }
    void clear() noexcept {
        while (count_ != 0) PyObject_GC_Del(objects_[--count_]);
    }

  private:
    static constexpr unsigned kSize = 32;
    PyObject* objects_[kKeepsObjects ? kSize : 1];
    unsigned count_ = 0;
};

}  // namespace optree
