// The Python module of the native library: loading it registers the ops' implementations (the
// other files, through PyTorch's stable ABI), and it tells what it was built with.
#include <Python.h>

#include "cpu/kernels.h"

namespace {

PyObject* isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(bit_kernels::kernels().isa);
}

PyObject* compiler(PyObject*, PyObject*) {
  return PyUnicode_FromString(__VERSION__);
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set whose kernels this processor runs."},
    {"compiler", compiler, METH_NOARGS, "The compiler that built the library."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
