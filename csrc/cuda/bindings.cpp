// The Python module of the CUDA library: loading it registers the ops' implementations (ops.cpp),
// and it tells what it was built for.
#include <Python.h>

namespace {

PyObject* architectures(PyObject*, PyObject*) {
  return PyUnicode_FromString(BIT_KERNELS_CUDA_ARCHS);
}

PyObject* compiler(PyObject*, PyObject*) {
  return PyUnicode_FromString(BIT_KERNELS_NVCC);
}

PyMethodDef methods[] = {
    {"architectures", architectures, METH_NOARGS,
     "The architectures there is machine code for, and after a + those there is PTX for."},
    {"compiler", compiler, METH_NOARGS, "The version of nvcc that built the library."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
