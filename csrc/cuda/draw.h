// Noise of a thread's elements: the four numbers of a Philox block, in the order of the noise contract.
#pragma once

#include "../normal.h"
#include "../tensors.h"

namespace fm {
namespace cuda {

FM_HD void draw_normals(const Stream& stream, uint32_t id, uint32_t block, float* z) {
  Words words = stream_words(stream, id, block);
  normal_pair(words.w[0], words.w[1], z, z + 1);
  normal_pair(words.w[2], words.w[3], z + 2, z + 3);
}

FM_HD void draw_uniforms(const Stream& stream, uint32_t id, uint32_t block, float* u) {
  Words words = stream_words(stream, id, block);
  for (int i = 0; i < 4; ++i) u[i] = uniform_from_word(words.w[i]);
}

}  // namespace cuda
}  // namespace fm
