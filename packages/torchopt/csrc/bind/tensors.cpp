// SPDX-License-Identifier: Apache-2.0
#include "bind/tensors.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "bind/buffers.h"
#include "bind/exchange.h"

namespace torchopt {
namespace {

/// Where torch keeps that the negation of a tensor's elements is pending: one bit of the description of the tensor, to
/// which the Python object points. Numbers of words.
struct Mark {
    std::size_t pointer = 0;
    std::size_t word = 0;
    std::uintptr_t bit = 0;  // 0: not known
};

/// The arguments of `learn_tensors`. The objects are kept until the process ends.
struct Known {
    std::vector<PyTypeObject*> classes;
    std::array<PyObject*, 4> dtypes{};
    Mark negation;
    const exchange::Table* table = nullptr;
};

Known& known() {
    static Known instance;
    return instance;
}

/// The names of tensor methods and attributes, created once.
struct Names {
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* numel = PyUnicode_InternFromString("numel");
    PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
    PyObject* is_neg = PyUnicode_InternFromString("is_neg");
    PyObject* get_device = PyUnicode_InternFromString("get_device");
    PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
    PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
};

const Names& names() {
    static const Names instance;
    return instance;
}

py::object owned(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

/// The result of a method without arguments. Throws if the method raised.
py::object call(PyObject* object, PyObject* name) {
    return owned(PyObject_CallMethodNoArgs(object, name));
}

py::object attribute(PyObject* object, PyObject* name) {
    return owned(PyObject_GetAttr(object, name));
}

bool is_plain(PyObject* tensor) {
    const auto& classes = known().classes;
    return std::find(classes.begin(), classes.end(), Py_TYPE(tensor)) != classes.end();
}

const std::uintptr_t* words_of(const PyObject* object) {
    return reinterpret_cast<const std::uintptr_t*>(object);
}

/// The description of a tensor; null for a tensor that torch has cleared.
const std::uintptr_t* description_of(const PyObject* tensor, std::size_t pointer) {
    return reinterpret_cast<const std::uintptr_t*>(words_of(tensor)[pointer]);
}

/// Whether the elements are those in memory. DLPack does not report a pending negation.
bool is_as_stored(PyObject* tensor) {
    const Mark& mark = known().negation;
    if (mark.bit != 0) {
        const std::uintptr_t* const description = description_of(tensor, mark.pointer);
        return description != nullptr && (description[mark.word] & mark.bit) == 0;
    }
    // The method takes longer than all other checks of a tensor.
    PyObject* const negated = PyObject_CallMethodNoArgs(tensor, names().is_neg);
    if (negated == nullptr) PyErr_Clear();
    Py_XDECREF(negated);
    return negated == Py_False;
}

std::optional<Dtype> dtype_of(const exchange::ElementType& type) {
    if (type.lanes != 1) return std::nullopt;
    if (type.kind == exchange::kBFloats && type.bits == 16) return Dtype::kBFloat16;
    if (type.kind != exchange::kFloats) return std::nullopt;
    switch (type.bits) {
        case 32: return Dtype::kFloat32;
        case 64: return Dtype::kFloat64;
        case 16: return Dtype::kFloat16;
        default: return std::nullopt;
    }
}

exchange::ElementType element_type(Dtype dtype) {
    switch (dtype) {
        case Dtype::kFloat32: return {exchange::kFloats, 32, 1};
        case Dtype::kFloat64: return {exchange::kFloats, 64, 1};
        case Dtype::kFloat16: return {exchange::kFloats, 16, 1};
        case Dtype::kBFloat16: return {exchange::kBFloats, 16, 1};
    }
    throw std::logic_error("torchopt._C: unknown dtype (our bug, please report)");
}

/// The number of elements, or -1 if they are not contiguous.
std::int64_t contiguous_size(const exchange::Tensor& x) {
    std::int64_t size = 1;
    bool contiguous = true;
    for (std::int32_t d = x.ndim - 1; d >= 0; --d) {
        if (x.shape[d] != 1 && x.strides != nullptr && x.strides[d] != size) contiguous = false;
        size *= x.shape[d];
    }
    return contiguous || size == 0 ? size : -1;
}

// --- tensors created here: one block holds this head, the shape, the strides and the elements ---

constexpr std::size_t kAlignment = 64;

struct Head {
    exchange::ManagedTensor managed;
    std::size_t bytes;  // of the whole block
};

void drop(exchange::ManagedTensor* tensor) {
    Head* const head = static_cast<Head*>(tensor->owner);
    buffers::give_back(head, head->bytes);
}

/// Creates a tensor with uninitialised elements and stores their address in `data`.
py::object make(const std::int64_t* shape, std::int32_t ndim, const exchange::ElementType& dtype,
                std::int64_t size, void*& data) {
    const auto dimensions = static_cast<std::size_t>(ndim);
    const std::size_t head_bytes =
        (sizeof(Head) + 2 * dimensions * sizeof(std::int64_t) + kAlignment - 1) / kAlignment *
        kAlignment;
    const std::size_t bytes = head_bytes + static_cast<std::size_t>(size) * (dtype.bits / 8);
    char* const block = static_cast<char*>(buffers::take(bytes));
    auto* const own_shape = reinterpret_cast<std::int64_t*>(block + sizeof(Head));
    std::int64_t* const strides = own_shape + dimensions;
    std::int64_t stride = 1;
    for (std::size_t d = dimensions; d-- > 0;) {
        own_shape[d] = shape[d];
        strides[d] = stride;
        stride *= std::max<std::int64_t>(shape[d], 1);
    }
    data = block + head_bytes;
    Head* const head = new (block) Head{};
    head->bytes = bytes;
    head->managed = {{exchange::kMajorVersion, 0},
                     head,
                     &drop,
                     0,
                     {data, {exchange::kCpuDevice, 0}, ndim, dtype, own_shape, strides, 0}};
    void* out = nullptr;
    // From here on torch owns the block, even if the call raises.
    if (known().table->import_managed(&head->managed, &out) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(out));
}

}  // namespace

void learn_tensors(py::tuple classes, py::tuple dtypes, py::object exchange) {
    Known& k = known();
    Known told;
    if (dtypes.size() != told.dtypes.size())
        throw std::invalid_argument("torchopt._C: expected one dtype for each code");
    for (std::size_t i = 0; i < told.dtypes.size(); ++i)
        told.dtypes[i] = py::object(dtypes[i]).release().ptr();
    for (const py::handle type : classes)
        told.classes.push_back(reinterpret_cast<PyTypeObject*>(
            py::reinterpret_borrow<py::object>(type).release().ptr()));
    told.negation = k.negation;
    if (!exchange.is_none()) {
        const void* const pointer = PyCapsule_GetPointer(exchange.ptr(), exchange::kCapsule);
        if (pointer == nullptr) throw py::error_already_set();
        // A newer table links to older ones. A version with another major number has another layout.
        const auto* table = static_cast<const exchange::Table*>(pointer);
        while (table != nullptr && table->version.major != exchange::kMajorVersion)
            table = table->previous;
        if (table != nullptr && table->view != nullptr) told.table = table;
    }
    k = told;
}

bool learn_negation(const py::list& plain, const py::list& negated) {
    // The description of torch 2.4 has 24 words, that of torch 2.13 has 22. The bit is in the last one, and no word behind
    // it is read.
    constexpr std::size_t kWords = 24;
    constexpr std::size_t kHead = sizeof(PyObject) / sizeof(std::uintptr_t);
    known().negation = {};
    const auto points = [](const py::list& tensors, std::size_t pointer) {
        return std::all_of(tensors.begin(), tensors.end(), [&](py::handle x) {
            return is_plain(x.ptr()) &&
                   py::int_(x.attr("_cdata")).cast<std::uintptr_t>() == words_of(x.ptr())[pointer];
        });
    };
    for (const std::size_t pointer : {kHead, kHead + 1}) {
        if (plain.empty() || negated.empty() || !points(plain, pointer) ||
            !points(negated, pointer))
            continue;
        for (std::size_t word = 0; word < kWords; ++word) {
            std::uintptr_t bits = ~std::uintptr_t{0};
            for (const py::handle x : negated) bits &= description_of(x.ptr(), pointer)[word];
            for (const py::handle x : plain) bits &= ~description_of(x.ptr(), pointer)[word];
            if (!std::has_single_bit(bits)) continue;
            known().negation = {pointer, word, bits};
            return true;
        }
    }
    return false;
}

bool can_make_tensors() { return known().table != nullptr; }

std::uintptr_t address_of(PyObject* tensor) {
    const py::object pointer = call(tensor, names().data_ptr);
    const std::size_t address = PyLong_AsSize_t(pointer.ptr());
    if (address == static_cast<std::size_t>(-1) && PyErr_Occurred() != nullptr)
        throw py::error_already_set();
    return address;
}

std::int64_t size_of(PyObject* tensor) {
    const py::object size = call(tensor, names().numel);
    const long long value = PyLong_AsLongLong(size.ptr());
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
}

bool Dense::has_shape_of(const Dense& other) const {
    return ndim == other.ndim && std::equal(shape, shape + ndim, other.shape);
}

std::optional<Dense> Reader::read(PyObject* tensor) {
    return is_plain(tensor) ? read_again(tensor) : std::nullopt;
}

std::optional<Dense> Reader::read_again(PyObject* tensor) {
    if (!is_as_stored(tensor)) return std::nullopt;
    const exchange::Table* const table = known().table;
    if (table == nullptr) {
        try {
            return ask(tensor);
        } catch (const py::error_already_set&) {
            return std::nullopt;  // has no memory of its own, such as a sparse or batched tensor
        }
    }
    exchange::Tensor x{};
    if (table->view(tensor, &x) != 0) {
        PyErr_Clear();  // as above
        return std::nullopt;
    }
    const std::optional<Dtype> dtype = dtype_of(x.dtype);
    const std::int64_t size = contiguous_size(x);
    const bool on_cpu = x.device.type == exchange::kCpuDevice;
    if (!dtype || size < 0 || !(on_cpu || x.device.type == exchange::kCudaDevice))
        return std::nullopt;
    if (x.data == nullptr && size != 0) return std::nullopt;
    return Dense{reinterpret_cast<std::uintptr_t>(x.data) + x.byte_offset,
                 size,
                 *dtype,
                 on_cpu ? kCpu : x.device.index,
                 x.ndim,
                 x.shape};
}

std::optional<Dense> Reader::ask(PyObject* tensor) {
    const Known& k = known();
    const py::object dtype = attribute(tensor, names().dtype);
    const auto found = std::find(k.dtypes.begin(), k.dtypes.end(), dtype.ptr());
    if (found == k.dtypes.end() || call(tensor, names().is_contiguous).ptr() != Py_True)
        return std::nullopt;
    const bool on_cpu = attribute(tensor, names().is_cpu).ptr() == Py_True;
    if (!on_cpu && attribute(tensor, names().is_cuda).ptr() != Py_True) return std::nullopt;
    const int device = on_cpu ? kCpu : call(tensor, names().get_device).cast<int>();
    shape_ = attribute(tensor, names().shape).cast<std::vector<std::int64_t>>();
    const std::int64_t size = size_of(tensor);
    const std::uintptr_t address = address_of(tensor);
    if (address == 0 && size != 0) return std::nullopt;
    return Dense{address,
                 size,
                 static_cast<Dtype>(found - k.dtypes.begin()),
                 device,
                 static_cast<std::int32_t>(shape_.size()),
                 shape_.data()};
}

Span span_of(const Dense& x) {
    const auto bytes = static_cast<std::uintptr_t>(x.size) * (element_type(x.dtype).bits / 8);
    return {x.address, x.address + bytes};
}

bool sort_disjoint(std::vector<Span>& spans) {
    std::erase_if(spans, [](const Span& s) { return s.begin == s.end; });
    std::sort(spans.begin(), spans.end(),
              [](const Span& a, const Span& b) { return a.begin < b.begin; });
    for (std::size_t i = 1; i < spans.size(); ++i)
        if (spans[i].begin < spans[i - 1].end) return false;
    return true;
}

bool are_disjoint(const py::list& tensors) {
    Reader reader;
    std::vector<Span> spans;
    for (const py::handle tensor : tensors) {
        const std::optional<Dense> x = reader.read(tensor.ptr());
        if (!x) return false;
        spans.push_back(span_of(*x));
    }
    return sort_disjoint(spans);
}

bool requires_grad(PyObject* tensor) {
    return attribute(tensor, names().requires_grad).ptr() == Py_True;
}

py::object make_tensor(const Dense& like, std::uintptr_t& address) {
    void* data = nullptr;
    py::object made = make(like.shape, like.ndim, element_type(like.dtype), like.size, data);
    address = like.size == 0 ? 0 : reinterpret_cast<std::uintptr_t>(data);
    return made;
}

py::object make_count(std::int64_t value) {
    void* data = nullptr;
    py::object made = make(nullptr, 0, {exchange::kIntegers, 64, 1}, 1, data);
    *static_cast<std::int64_t*>(data) = value;
    return made;
}

std::optional<std::int64_t> count_of(PyObject* tensor) {
    if (known().table == nullptr || !is_plain(tensor) || !is_as_stored(tensor)) return std::nullopt;
    exchange::Tensor x{};
    if (known().table->view(tensor, &x) != 0) {
        PyErr_Clear();
        return std::nullopt;
    }
    if (x.ndim != 0 || x.dtype.kind != exchange::kIntegers || x.dtype.bits != 64 ||
        x.device.type != exchange::kCpuDevice || x.data == nullptr)
        return std::nullopt;
    return *reinterpret_cast<const std::int64_t*>(static_cast<const char*>(x.data) + x.byte_offset);
}

}  // namespace torchopt
