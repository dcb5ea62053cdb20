// SPDX-License-Identifier: Apache-2.0
#include "cpython/code.h"

namespace optree {

// Whether the functions below return the same parts as the attributes of a Python function.
bool try_code() {
    const Owned globals = must(PyDict_New());
    const Owned maker =
        must(Py_CompileString("(lambda a: lambda b, c: a)(1001)", "<optree>", Py_eval_input));
    const Owned function = must(PyEval_EvalCode(maker.get(), globals.get(), globals.get()));
    const Owned code = must(PyObject_GetAttrString(function.get(), "__code__"));
    const Owned its_globals = must(PyObject_GetAttrString(function.get(), "__globals__"));
    const Owned weakref = must(PyWeakref_NewRef(function.get(), nullptr));
    const Owned method = must(PyStaticMethod_New(function.get()));
    const Owned answer = must(PyObject_CallFunction(function.get(), "ii", 2, 3));
    return PyFunction_Check(function.get()) && code_of(function.get()) == code.get() &&
           globals_of(function.get()) == its_globals.get() && parameters_of(code.get()) == 2 &&
           size_of_closure(function.get()) == 1 &&
           held_by_closure(function.get(), 0) == answer.get() &&
           target_of(weakref.get()) == function.get() &&
           callable_of_static(method.get()) == function.get();
}

}  // namespace optree
