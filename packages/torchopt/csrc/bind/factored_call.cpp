// SPDX-License-Identifier: Apache-2.0
#include "bind/factored_call.h"

#include <algorithm>
#include <cstdint>
#include <optional>

#include "bind/fork.h"
#include "bind/rule_table.h"
#include "bind/tensors.h"
#include "launch/factored_rms.h"
#include "launch/openmp.h"

namespace torchopt {
namespace {

/// The gradient and its state as one FactoredTensor; nothing if the state does not fit the gradient.
std::optional<FactoredTensor> form_of(const Dense& g, const Dense& p, const Dense& row,
                                      const Dense& column) {
    if (g.dtype != Dtype::kFloat32 && g.dtype != Dtype::kFloat64) return std::nullopt;
    for (const Dense* x : {&p, &row, &column})
        if (x->dtype != g.dtype || x->device != kCpu) return std::nullopt;
    if (g.device != kCpu || g.size == 0 || !p.has_shape_of(g)) return std::nullopt;
    FactoredTensor x{};
    x.dtype = g.dtype;
    x.is_vector = g.ndim < 2;
    x.gradient = g.address;
    x.parameter = p.address;
    x.row = row.address;
    x.column = column.address;
    x.rows = x.is_vector ? g.size : g.shape[g.ndim - 2];
    x.columns = x.is_vector ? 1 : g.shape[g.ndim - 1];
    x.batch = x.is_vector ? 1 : g.size / (x.rows * x.columns);
    const bool fits = x.is_vector
                          ? row.size == g.size
                          : row.size == x.batch * x.rows && column.size == x.batch * x.columns;
    return fits ? std::optional<FactoredTensor>(x) : std::nullopt;
}

}  // namespace

py::object factored_rms_call(const py::list& grads, const py::list& params, const py::list& rows,
                             const py::list& columns, const std::vector<double>& hypers,
                             bool inplace, int num_threads) {
    const std::size_t count = grads.size();
    if (params.size() != count || rows.size() != count || columns.size() != count)
        refuse("expected as many parameters and states as gradients");
    if (hypers.size() != 5) refuse("expected five hyper-parameters");
    if (!can_make_tensors() || count == 0) return py::none();
    std::vector<FactoredTensor> tensors;
    py::list updates, new_rows, new_columns;
    std::int64_t total = 0, largest = 0;
    std::vector<Span> written;
    // One reader for each: a shape is valid until the next call of its reader.
    Reader of_g, of_p, of_row, of_column;
    for (std::size_t i = 0; i < count; ++i) {
        const auto place = static_cast<Py_ssize_t>(i);
        const auto g = of_g.read(PyList_GET_ITEM(grads.ptr(), place));
        const auto p = of_p.read(PyList_GET_ITEM(params.ptr(), place));
        const auto row = of_row.read(PyList_GET_ITEM(rows.ptr(), place));
        const auto column = of_column.read(PyList_GET_ITEM(columns.ptr(), place));
        if (!g || !p || !row || !column) return py::none();
        std::optional<FactoredTensor> x = form_of(*g, *p, *row, *column);
        if (!x) return py::none();
        updates.append(make_tensor(*g, x->update));
        if (inplace) {
            x->new_row = x->row;
            x->new_column = x->column;
        } else {
            new_rows.append(make_tensor(*row, x->new_row));
            // A vector has no columns.
            new_columns.append(x->is_vector ? py::reinterpret_borrow<py::object>(
                                                  PyList_GET_ITEM(columns.ptr(), place))
                                            : make_tensor(*column, x->new_column));
        }
        if (inplace) {
            written.push_back(span_of(*row));
            if (!x->is_vector) written.push_back(span_of(*column));
        }
        total += g->size;
        largest = std::max(largest, g->size);
        tensors.push_back(*x);
    }
    if (!sort_disjoint(written)) return py::none();
    const bool many = total > kChunk;
    if (many && num_threads > 1 && 2 * total < largest * num_threads) return py::none();
    const FactoredHypers h{hypers[0], hypers[1], hypers[2], hypers[3], hypers[4]};
    if (many) {
        const py::gil_scoped_release no_gil;
        factored_rms(tensors, h, forks::usable_threads(num_threads));
    } else {
        factored_rms(tensors, h, 1);
    }
    if (inplace) return py::make_tuple(updates, rows, columns);
    return py::make_tuple(updates, new_rows, new_columns);
}

}  // namespace torchopt
