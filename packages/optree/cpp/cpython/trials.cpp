// SPDX-License-Identifier: Apache-2.0
#include "cpython/trials.h"

namespace optree {

void run_trials() noexcept {
    const auto run = [](Trial& trial, bool (*attempt)()) {
        bool held = false;
        try {
            held = attempt();
        } catch (const TrialFailed&) {
        }
        trial.set(held && !PyErr_Occurred());
        PyErr_Clear();
    };
#define OPTREE_TRIAL(name) run(trials.name, try_##name);
    OPTREE_TRIALS(OPTREE_TRIAL)
#undef OPTREE_TRIAL
}

}  // namespace optree
