// SPDX-License-Identifier: Apache-2.0
// Whether this interpreter has the memory layouts that the other files of this folder assume. Each
// layout has a version check at compile time, a trial on private objects when the module is
// imported, and a fallback that uses documented calls. The results of the trials are stored here.
#pragma once

#include <atomic>
#include <memory>

#include "cpython/compat.h"

namespace optree {

// A fact about the process: every interpreter in it gets the same result.
class Trial {
  public:
    OPTREE_INLINE bool held() const noexcept { return held_.load(std::memory_order_relaxed); }
    void set(bool held) noexcept { held_.store(held, std::memory_order_relaxed); }

  private:
    std::atomic<bool> held_{false};
};

// The trials by name. The function bool try_<name>() in the file of that name runs one.
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

// Runs all trials. A trial that raises counts as failed; no exception stays set.
void run_trials() noexcept;

// Owns one object of a trial.
struct DropReference {
    void operator()(PyObject* object) const noexcept { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, DropReference>;

// The result of a call in a trial. The trial fails if the call raised.
struct TrialFailed {};
inline Owned must(PyObject* object) {
    if (object == nullptr) throw TrialFailed{};
    return Owned(object);
}
inline void must_do(int status) {
    if (status < 0) throw TrialFailed{};
}

}  // namespace optree
