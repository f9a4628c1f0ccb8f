// bit_kernels._data, the library for what takes NumPy arrays: pybind11, and nothing of torch.
// Here are mixup's checks and its registration; the kernel is in mixup_kernel.h, the
// op's definition in bit_kernels/ops/mixup.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "../common/isa.h"
#include "../common/parallel.h"
#include "kernels.h"

namespace py = pybind11;

namespace bit_kernels {

namespace baseline {
MixupRows mixup_rows;
}
#if defined(__x86_64__)
namespace avx2 {
MixupRows mixup_rows;
}
namespace avx512 {
MixupRows mixup_rows;
}
#endif

namespace {

constexpr int64_t kStreamBytes = int64_t{1} << 20;  // as in common/vec.h

// What bit_kernels._native lends: its loop over torch's threads (common/parallel.h). Threads of
// this library's own would have to share the cores with torch's, which wait for work in a loop.
using ParallelFor = void(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);

MixupRows* mixup_rows() {
#if defined(__x86_64__)
  const Isa isa = best_isa();
  if (isa == Isa::kAvx512) return avx512::mixup_rows;
  if (isa == Isa::kAvx2) return avx2::mixup_rows;
#endif
  return baseline::mixup_rows;
}

void check(bool ok, const std::string& message) {
  if (!ok) throw py::value_error("bit_kernels._data.mixup: " + message);
}

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
const T* data_of(const char* name, const Array<T>& array, int64_t count) {
  check(array.size() == count, std::string(name) + " has " + std::to_string(array.size()) +
                                   " elements; it must have " + std::to_string(count));
  return array.data();
}

// The images of a batch as what they are read through. Holds their buffers while they are read.
class Images {
 public:
  // images: one buffer (N, H, W, C), or a sequence of N buffers (H, W, C).
  explicit Images(const py::object& images) {
    if (PyObject_CheckBuffer(images.ptr())) {
      const py::buffer_info& all = hold(images, 4);
      for (py::ssize_t i = 0; i < all.shape[0]; ++i) add(all, 1, i * all.strides[0]);
      return;
    }
    check(py::isinstance<py::sequence>(images), "images is no buffer and no sequence of them");
    for (py::handle image : images) add(hold(image, 3), 0, 0);
  }

  int64_t count() const { return static_cast<int64_t>(whole_.size()); }

  std::vector<MixupImage> cropped(int64_t rows, int64_t columns, int64_t channels,
                                  const int64_t* corners, const bool* flips) const {
    std::vector<MixupImage> crops;
    crops.reserve(whole_.size());
    for (size_t i = 0; i < whole_.size(); ++i) {
      const Whole& image = whole_[i];
      const int64_t top = corners[2 * i], left = corners[2 * i + 1];
      check(image.channels == channels, "images differ in their number of channels");
      check(0 <= top && top <= image.rows - rows && 0 <= left && left <= image.columns - columns,
            "a crop lies outside of image " + std::to_string(i));
      crops.push_back(
          {image.pixels + top * image.stride + left * channels, image.stride, flips[i]});
    }
    return crops;
  }

 private:
  struct Whole {
    const uint8_t* pixels;
    int64_t rows, columns, channels, stride;
  };

  const py::buffer_info& hold(py::handle image, py::ssize_t dimensions) {
    check(PyObject_CheckBuffer(image.ptr()), "an image is no buffer");
    held_.push_back(py::reinterpret_borrow<py::buffer>(image).request());
    const py::buffer_info& info = held_.back();
    check(info.itemsize == 1 && info.format == "B", "images must be uint8");
    check(info.ndim == dimensions, "images must be (N, H, W, C) or N of (H, W, C)");
    const py::ssize_t channels = info.shape[dimensions - 1];
    check(info.size == 0 || (info.strides[dimensions - 1] == 1 || channels == 1),
          "the channels of a pixel must lie together");
    check(info.size == 0 || info.shape[dimensions - 2] == 1 ||
              info.strides[dimensions - 2] == channels,
          "the pixels of a row must lie together");
    return info;
  }

  void add(const py::buffer_info& info, int first, int64_t offset) {
    whole_.push_back({static_cast<const uint8_t*>(info.ptr) + offset, info.shape[first],
                      info.shape[first + 1], info.shape[first + 2], info.strides[first]});
  }

  std::vector<py::buffer_info> held_;
  std::vector<Whole> whole_;
};

Element element_of(const std::string& dtype) {
  if (dtype == "float32") return Element::kFloat32;
  if (dtype == "bfloat16") return Element::kBFloat16;
  check(dtype == "float16", "dtype is " + dtype + "; it may be float32, bfloat16 or float16");
  return Element::kFloat16;
}

void mixup(const py::object& images, const Array<int64_t>& corners, const Array<bool>& flips,
           const Array<int64_t>& partner, const Array<float>& lam, const Array<float>& centre,
           const Array<float>& scale, int64_t rows, int64_t columns, const std::string& dtype,
           Array<uint8_t>& output, const std::optional<py::capsule>& parallel_for) {
  const Images held(images);
  const int64_t samples = partner.size(), channels = centre.size();
  check(rows > 0 && columns > 0 && channels > 0, "a crop has no pixels");
  check(samples <= held.count(), "partner has more elements than there are images");
  const std::vector<MixupImage> crops =
      held.cropped(rows, columns, channels, data_of("corners", corners, 2 * held.count()),
                   data_of("flips", flips, held.count()));
  const int64_t* others = partner.data();
  for (int64_t i = 0; i < samples; ++i)
    check(0 <= others[i] && others[i] < held.count(), "partner names no image");
  const Element element = element_of(dtype);
  const int64_t elements = samples * rows * columns * channels;
  const int64_t nbytes = elements * (element == Element::kFloat32 ? 4 : 2);
  check(output.size() == nbytes, "output has " + std::to_string(output.size()) +
                                     " bytes; it must have " + std::to_string(nbytes));
  const MixupBatch batch = {rows,
                            columns,
                            channels,
                            crops.data(),
                            others,
                            data_of("lam", lam, samples),
                            data_of("centre", centre, channels),
                            data_of("scale", scale, channels),
                            element,
                            output.mutable_data(),  // raises for one that can't be written
                            nbytes >= kStreamBytes};
  static MixupRows* const run = mixup_rows();
  const bool parallel = parallel_for && elements >= kParallelElements;
  auto* const loop =
      parallel ? reinterpret_cast<ParallelFor*>(parallel_for->get_pointer<void>()) : nullptr;
  const py::gil_scoped_release released;
  if (!parallel) return run(batch, 0, samples * rows);
  loop(
      samples * rows,
      [](int64_t begin, int64_t end, void* batch) {
        run(*static_cast<const MixupBatch*>(batch), begin, end);
      },
      const_cast<MixupBatch*>(&batch));
}

}  // namespace
}  // namespace bit_kernels

PYBIND11_MODULE(_data, m) {
  m.doc() = "Kernels that take NumPy arrays; bit_kernels/ops/mixup.py calls them.";
  m.def("mixup", &bit_kernels::mixup, py::arg("images"), py::arg("corners").noconvert(),
        py::arg("flips").noconvert(), py::arg("partner").noconvert(), py::arg("lam").noconvert(),
        py::arg("centre").noconvert(), py::arg("scale").noconvert(), py::arg("rows"),
        py::arg("columns"), py::arg("dtype"), py::arg("output").noconvert(), py::arg("parallel_for"));
}
