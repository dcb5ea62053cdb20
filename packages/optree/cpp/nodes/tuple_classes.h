// SPDX-License-Identifier: Apache-2.0
// Which tuple classes are namedtuples or PyStructSequences, remembered per class.
#pragma once

#include "support/pointer_map.h"
#include "support/ref.h"
#include "support/sharing.h"

namespace optree {

struct TupleClass {
    bool member;        // belongs to the family
    PyObject* weakref;  // evicts the entry when the class dies; null for static types
    // How instances are made: the type version (32 bits) and the number of items (31) for which it
    // was decided, and whether calling the class may be left out (1). Zero: not decided.
    std::atomic<std::uint64_t> making{0};
};

// One family of tuple classes, read without a lock. Holds no class alive: a heap type gets one weak
// reference, whose callback evicts it, the first time it is asked about.
class TupleFamily {
  public:
    using Test = bool (*)(PyTypeObject*);

    TupleFamily() = default;
    TupleFamily(const TupleFamily&) = delete;
    TupleFamily& operator=(const TupleFamily&) = delete;
    ~TupleFamily() { clear(); }

    void init(Test test, PyObject* evict) noexcept {
        test_ = test;
        evict_ = evict;
    }
    // Whether `type` belongs to the family. May run Python code the first time.
    bool contains(PyTypeObject* type) {
        {
            const ReaderSection section;
            if (const TupleClass* known = classes_.peek().find(type)) return known->member;
        }
        return learn(type);
    }
    // Whether `type(*items)` for `count` items is just a new tuple of them (`makes_plain_tuple`).
    // Decided anew whenever the class changes, which may run Python code.
    bool makes_directly(PyTypeObject* type, std::size_t count) {
        const unsigned int version = compat::type_version(type);
        const std::uint64_t question = std::uint64_t{version} << 32 | std::uint64_t{count} << 1;
        std::uint64_t making = 0;
        {
            const ReaderSection section;
            const TupleClass* known = classes_.peek().find(type);
            if (known != nullptr) making = known->making.load(std::memory_order_relaxed);
        }
        if (OPTREE_LIKELY((making & ~std::uint64_t{1}) == question && version != 0)) {
            return (making & 1) != 0;
        }
        return decide(type, count, question);
    }
    // Called by the weak reference's callback.
    void evict(PyObject* weakref) noexcept;
    void clear() noexcept;
    // Forgets everything and remembers nothing from now on: the callback is going away.
    void close() noexcept {
        evict_ = nullptr;
        clear();
    }
    int traverse(visitproc visit, void* arg) const;

  private:
    using Classes = PointerMap<PyTypeObject, TupleClass>;  // owns the entries

    OPTREE_NOINLINE bool learn(PyTypeObject* type);
    OPTREE_NOINLINE bool decide(PyTypeObject* type, std::size_t count, std::uint64_t question);

    Test test_ = nullptr;
    PyObject* evict_ = nullptr;  // borrowed: the callback, kept by the state
    Lock lock_;                  // held by who changes `classes_`
    Published<Classes> classes_;
};

// A tuple subclass with `_fields`, an exact tuple of exact str, and callable `_make` and `_asdict`.
bool is_namedtuple_class(PyTypeObject* type);
// A class as C's PyStructSequence makes them: final, directly under tuple, with field counts.
bool is_structseq_class(PyTypeObject* type);

// Whether `cls(*items)` is just a new tuple of `items`: `__new__` is the one that
// collections.namedtuple generates, and neither `__init__` nor the metaclass intervenes.
bool makes_plain_tuple(PyTypeObject* type, std::size_t arity);

// Names of the fields of a namedtuple class, or of the visible fields of a PyStructSequence class
// (unnamed ones by the marker "unnamed field"), as a tuple.
Ref namedtuple_fields(PyTypeObject* type);
Ref structseq_fields(PyTypeObject* type);

}  // namespace optree
