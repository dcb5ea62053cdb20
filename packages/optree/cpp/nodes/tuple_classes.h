// SPDX-License-Identifier: Apache-2.0
// Caches for each tuple class whether it is a namedtuple or a PyStructSequence.
#pragma once

#include <array>

#include "cpython/collector_pause.h"
#include "support/pointer_map.h"
#include "support/ref.h"
#include "support/sharing.h"

namespace optree {

// How the instances of a class are created, and the facts behind that decision.
struct Making {
    unsigned int version = 0;  // of the class; 0: not decided
    std::size_t count = 0;     // the number of items that it was decided for
    bool direct = false;       // instances can be created without calling the class
    newfunc tp_new = nullptr;
    PyObject* method = nullptr;  // borrowed from the class: the staticmethod `__new__`
    Ref code;                    // of the function that it wraps
    Ref tuple_new;               // the value of the function's global name `_tuple_new`
};

enum class TupleSort : unsigned char { other, namedtuple, structseq };

struct TupleClass {
    TupleSort sort;
    PyObject* weakref;  // owned: evicts the entry when the class dies; null for static types
    Published<Making> making;

    TupleClass(TupleSort sort_, PyObject* weakref_) : sort(sort_), weakref(weakref_) {}
};

// Facts about tuple classes, read without a lock. Keeps no class alive: a heap type gets one weak
// reference when it is first queried, whose callback evicts the entry.
class TupleClasses {
  public:
    TupleClasses() = default;
    TupleClasses(const TupleClasses&) = delete;
    TupleClasses& operator=(const TupleClasses&) = delete;
    ~TupleClasses() { clear(); }

    // `pause` ends before Python code may run.
    void init(PyObject* evict, CollectorPause& pause) {
        evict_ = evict;
        pause_ = &pause;
        str_new_ = checked(PyUnicode_InternFromString("__new__"));
        str_tuple_new_ = checked(PyUnicode_InternFromString("_tuple_new"));
    }
    // May run Python code the first time.
    TupleSort sort_of(PyTypeObject* type) {
        {
            const ReaderSection section;
            if (const TupleClass* known = classes_.peek().of_type.find(type)) return known->sort;
        }
        return learn(type);
    }
    bool is_namedtuple(PyTypeObject* type) { return sort_of(type) == TupleSort::namedtuple; }
    bool is_structseq(PyTypeObject* type) { return sort_of(type) == TupleSort::structseq; }
    // Whether `type(*items)` with `count` items only creates a tuple of them. The decision is made
    // again when the class changes, which may run Python code. The facts behind it are checked in
    // each call.
    bool makes_directly(PyTypeObject* type, std::size_t count) {
        if (kKeepsAnswer && answered_.type == type && answered_.count == count) return true;
        return ask_directly(type, count);
    }
    // A part of a walk that runs no Python code or, nested inside one, a part that may. Only in the
    // former the class queried last is assumed to be unchanged. This saves a tenth of unflatten on
    // namedtuples (benchmarks/optree).
    class Stretch {
      public:
        OPTREE_INLINE Stretch(TupleClasses& classes, bool quiet) noexcept
            : classes_(classes), before_(classes.is_quiet_) {
            turn(quiet);
        }
        Stretch(const Stretch&) = delete;
        Stretch& operator=(const Stretch&) = delete;
        OPTREE_INLINE ~Stretch() { turn(before_); }

      private:
        OPTREE_INLINE void turn(bool quiet) noexcept {
            if (!kKeepsAnswer) return;
            classes_.is_quiet_ = quiet;
            if (!quiet) classes_.answered_.type = nullptr;
        }
        TupleClasses& classes_;
        bool before_;
    };
    // Called by the callback of the weak reference.
    void evict(PyObject* weakref);
    void clear() noexcept;
    // Forgets everything and stops caching: the callback is about to be destroyed.
    void close() noexcept {
        evict_ = nullptr;
        clear();
    }
    int traverse(visitproc visit, void* arg) const;

  private:
    struct Classes {
        PointerMap<PyTypeObject, TupleClass> of_type;  // owns the entries
        PointerMap<PyObject, PyTypeObject> of_weakref;
    };

    // The recorded way in which a class creates its instances; null for a class that was never
    // queried.
    const Making* making_of(PyTypeObject* type) noexcept;
    void forget_recent() noexcept { recent_ = {}; }

    static constexpr bool kKeepsAnswer = !compat::kFreeThreaded && !compat::kCollectsInAllocations;

    bool ask_directly(PyTypeObject* type, std::size_t count);
    OPTREE_NOINLINE TupleSort learn(PyTypeObject* type);
    OPTREE_NOINLINE bool decide(PyTypeObject* type, std::size_t count);

    PyObject* evict_ = nullptr;  // borrowed: the callback, which the state keeps alive
    CollectorPause* pause_ = nullptr;
    Ref str_new_;
    Ref str_tuple_new_;
    Lock lock_;  // held while `classes_` is changed
    Published<Classes> classes_;
    // The classes queried last, used with the interpreter lock. Faster than the table of classes by
    // 2 % of unflatten on namedtuples (benchmarks/optree).
    struct Recent {
        PyTypeObject* type = nullptr;
        const Making* making = nullptr;
    };
    std::array<Recent, 8> recent_{};
    // The class and the number of items of the last `true`.
    struct Answer {
        PyTypeObject* type = nullptr;
        std::size_t count = 0;
    };
    Answer answered_{};
    bool is_quiet_ = false;  // nothing is cached otherwise
};

// The field names of a namedtuple class, or of the visible fields of a PyStructSequence class, as a
// tuple. Unnamed fields have the marker "unnamed field".
Ref namedtuple_fields(PyTypeObject* type);
Ref structseq_fields(PyTypeObject* type);

}  // namespace optree
