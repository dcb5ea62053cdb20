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
    run(trials.dict_table, try_dict_table);
    run(trials.odict_list, try_odict_list);
    run(trials.list_items, try_list_items);
    run(trials.tuple_items, try_tuple_items);
    run(trials.type_slots, try_type_slots);
    run(trials.code, try_code);
    run(trials.gc_memory, try_gc_memory);
}

}  // namespace optree
