// SPDX-License-Identifier: Apache-2.0
// Which tuple classes are namedtuples or PyStructSequences, remembered per class.
#pragma once

#include <unordered_map>

#include "support/ref.h"

namespace optree {

struct TupleClass {
    bool member = false;       // belongs to the family
    unsigned int version = 0;  // type version for which `direct` was decided; 0: never
    bool direct = false;       // instances of `arity` items may be made without calling the class
    std::size_t arity = 0;
    PyObject* weakref = nullptr;  // evicts the entry when the class dies; null for static types
};

// One family of tuple classes. Holds no class alive: a heap type gets one weak reference, whose
// callback evicts it, the first time it is asked about.
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
    // The entry of `type`. May run Python code the first time.
    TupleClass& entry(PyTypeObject* type);
    bool contains(PyTypeObject* type) { return entry(type).member; }
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
    Test test_ = nullptr;
    PyObject* evict_ = nullptr;  // borrowed: the callback, kept by the state
    std::unordered_map<PyTypeObject*, TupleClass> classes_;
    TupleClass unremembered_;  // the answer where nothing may be remembered
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
