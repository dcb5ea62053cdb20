// SPDX-License-Identifier: Apache-2.0
#include "bind/newton_schulz_call.h"

#include <cstdint>
#include <vector>

#include "bind/fork.h"
#include "bind/rule_table.h"
#include "bind/tensors.h"
#include "launch/newton_schulz.h"
#include "launch/openmp.h"

namespace torchopt {

py::object newton_schulz_call(const py::list& matrices, const py::list& scales, int steps, double a,
                              double b, double c, double eps, int num_threads) {
    if (scales.size() != matrices.size()) refuse("expected as many scales as matrices");
    if (!can_make_tensors()) return py::none();
    std::vector<OrthogonalizedMatrix> small;
    py::list results;
    std::int64_t total = 0;
    Reader reader;
    for (std::size_t i = 0; i < matrices.size(); ++i) {
        const auto place = static_cast<Py_ssize_t>(i);
        const auto g = reader.read(PyList_GET_ITEM(matrices.ptr(), place));
        if (!g || g->device != kCpu || g->ndim != 2 || g->size == 0 ||
            (g->dtype != Dtype::kFloat32 && g->dtype != Dtype::kFloat64) ||
            !is_small(g->shape[0], g->shape[1], g->dtype)) {
            results.append(py::none());
            continue;
        }
        OrthogonalizedMatrix x{g->shape[0], g->shape[1], g->dtype,
                               g->address,  0,           scales[i].cast<double>()};
        results.append(make_tensor(*g, x.target));
        total += g->size;
        small.push_back(x);
    }
    if (small.empty()) return py::none();
    const py::gil_scoped_release no_gil;
    const bool many = small.size() > 1 && total > kChunk / 16;
    newton_schulz(small, NewtonSchulz{steps, a, b, c, eps},
                  many ? forks::usable_threads(num_threads) : 1);
    return results;
}

}  // namespace torchopt
