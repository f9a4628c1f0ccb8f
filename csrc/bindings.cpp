// The Python module of the native library: loading it registers the ops' implementations (the
// other files, through PyTorch's stable ABI), and it tells what it was built with.
#include <Python.h>

#include <cstdint>
#include <cstring>

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

// FNV-1a over words sampled evenly, the first and the last among them: a change of nearly all
// elements of a tensor, such as a scaling, can't leave it.
PyObject* fingerprint(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "fingerprint takes an address and a number of bytes");
    return nullptr;
  }
  const unsigned long long address = PyLong_AsUnsignedLongLong(arguments[0]);
  const long long bytes = PyLong_AsLongLong(arguments[1]);
  if (PyErr_Occurred()) return nullptr;
  constexpr long long kSamples = 16, kWord = sizeof(uint64_t);
  const long long size = bytes < kWord ? bytes : kWord;
  const char* data = reinterpret_cast<const char*>(address);
  uint64_t hash = 0xcbf29ce484222325u;
  for (long long i = 0; i < kSamples && size > 0; ++i) {
    uint64_t word = 0;
    memcpy(&word, data + (bytes - size) * i / (kSamples - 1), size);
    hash = (hash ^ word) * 0x100000001b3u;
    hash ^= hash >> 32;
  }
  return PyLong_FromUnsignedLongLong(hash);
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set whose kernels this processor runs."},
    {"compiler", compiler, METH_NOARGS, "The compiler that built the library."},
    {"parallel_for", parallel_for, METH_NOARGS, "The loop over torch's threads, in a capsule."},
    {"fingerprint", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fingerprint)),
     METH_FASTCALL, "A number that changes with the memory (address, bytes), from 16 samples."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
