// The Python module of the native library: loading it registers the ops' implementations (the
// other files, through PyTorch's stable ABI), and it tells what it was built with.
#include <Python.h>

#include "common/parallel.h"
#include "cpu/kernels.h"

namespace {

PyObject* isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(bit_kernels::kernels().isa);
}

PyObject* compiler(PyObject*, PyObject*) {
  return PyUnicode_FromString(__VERSION__);
}

// For bit_kernels._data, which knows nothing of torch.
PyObject* parallel_for(PyObject*, PyObject*) {
  return PyCapsule_New(reinterpret_cast<void*>(&bit_kernels::parallel_for_erased), nullptr, nullptr);
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set whose kernels this processor runs."},
    {"compiler", compiler, METH_NOARGS, "The compiler that built the library."},
    {"parallel_for", parallel_for, METH_NOARGS, "The loop over torch's threads, in a capsule."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
