// SPDX-License-Identifier: Apache-2.0
// Caches the memory of dead objects for the next objects of their class. The memory includes the
// header of the garbage collector.
#pragma once

#include "cpython/trials.h"

namespace optree {

// Whether memory is cached between calls. The interpreter lock protects the cache. Sanitizers find
// more errors without it.
#if defined(Py_GIL_DISABLED) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kKeepsMemory = false;
#else
inline constexpr bool kKeepsMemory = true;
#endif
// Whether dead objects are cached. A build that lists all objects must see each allocation.
#if defined(Py_TRACE_REFS) || defined(PYPY_VERSION)
inline constexpr bool kKeepsObjects = false;
#else
inline constexpr bool kKeepsObjects = kKeepsMemory;
#endif

// CPython does the same for tuples and lists. Makes flatten a quarter faster on small trees
// (benchmarks/optree, tuple of 3). Only for classes of fixed size that have the header of the
// garbage collector.
class ObjectPool {
  public:
    ObjectPool() = default;
    ObjectPool(const ObjectPool&) = delete;
    ObjectPool& operator=(const ObjectPool&) = delete;
    ~ObjectPool() { clear(); }

    // A new instance of `type`, untracked. Its members have the values that the last owner left.
    // Null if the pool is empty.
    OPTREE_INLINE PyObject* take(PyTypeObject* type) noexcept {
        return count_ != 0 ? PyObject_Init(objects_[--count_], type) : nullptr;
    }
    // Keeps the memory of an untracked object without references. Returns false if the pool is
    // full. The caller must drop the object's reference to its class.
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
