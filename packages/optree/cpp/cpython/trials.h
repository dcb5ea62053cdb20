// SPDX-License-Identifier: Apache-2.0
// Whether this interpreter has the memory layouts that the other files of this folder assume. Each of them
// has a fence (the versions it knows, when compiled), a trial (on private objects, when the module
// is imported; its answer is here) and a fallback through documented calls.
#pragma once

#include <atomic>
#include <memory>

#include "cpython/compat.h"

namespace optree {

// Facts of the process: every interpreter in it finds the same.
class Trial {
  public:
    OPTREE_INLINE bool held() const noexcept { return held_.load(std::memory_order_relaxed); }
    void set(bool held) noexcept { held_.store(held, std::memory_order_relaxed); }

  private:
    std::atomic<bool> held_{false};
};

// The trials by name; bool try_<name>() in its own file makes one.
#define OPTREE_TRIALS(TRIAL) \
    TRIAL(dict_table)        \
    TRIAL(odict_list)        \
    TRIAL(list_items)        \
    TRIAL(tuple_items)       \
    TRIAL(type_slots)        \
    TRIAL(code)              \
    TRIAL(gc_memory)

#define OPTREE_TRIAL(name) bool try_##name();
OPTREE_TRIALS(OPTREE_TRIAL)
#undef OPTREE_TRIAL

struct Trials {
#define OPTREE_TRIAL(name) Trial name;
    OPTREE_TRIALS(OPTREE_TRIAL)
#undef OPTREE_TRIAL
};
inline Trials trials;

// Runs all trials. What goes wrong in one counts as failed; no error stays set.
void run_trials() noexcept;

// An object that a trial owns.
struct DropReference {
    void operator()(PyObject* object) const noexcept { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, DropReference>;

// What a call of a trial returned; the trial has failed if it raised.
struct TrialFailed {};
inline Owned must(PyObject* object) {
    if (object == nullptr) throw TrialFailed{};
    return Owned(object);
}
inline void must_do(int status) {
    if (status < 0) throw TrialFailed{};
}

}  // namespace optree
