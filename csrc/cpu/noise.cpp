// Normals, uniforms, signs and raw words of a stream, in the logical order of the noise contract, into any layout and dtype.
#include "signs.h"

namespace fm {
namespace FM_ISA {
namespace {

template <class Finish>
void float_units(const NoiseArgs& args, int64_t begin, int64_t end) {
  for_each_tile<Finish>(args.shape, args.tiling, args.key, args.purpose, always, begin, end, nothing_ahead,
                        [&](const Tile& tile, const float* noise) { scatter_any<float>(noise, tile, args.out); });
}

void sign_units(const NoiseArgs& args, int64_t begin, int64_t end) {
  for_each_tile<ToSigns>(args.shape, args.tiling, args.key, args.purpose, always, begin, end, nothing_ahead,
                         [&](const Tile& tile, const float* drawn) { store_signs(drawn_words(drawn), tile, args.out); });
}

void word_units(const NoiseArgs& args, int64_t begin, int64_t end) {
  Stream stream = stream_of(args.key, args.purpose);
  int64_t blocks = divide_up(args.shape.positions, 4);
  const View& out = args.out;
  walk_tiles(args.shape, args.tiling, begin, end, [&](const Tile& tile) {
    int64_t* to = static_cast<int64_t*>(out.data) + offset_of(out, tile);
    for (int64_t c = 0; c < tile.channels; ++c)
      for (int64_t p = 0; p < tile.positions; p += 4) {
        uint32_t block = static_cast<uint32_t>((tile.channel + c) * blocks + (tile.position + p) / 4);
        Words words = stream_words(stream, sample_id(args.key, tile.sample), block);
        for (int64_t i = p; i < lesser(p + 4, tile.positions); ++i) to[c * out.channel_stride + i * out.position_stride] = words.w[i - p];
      }
  });
}

}  // namespace

void noise_units(const NoiseArgs& args, int64_t begin, int64_t end) {
  if (args.kind == DrawKind::normal) float_units<ToNormals>(args, begin, end);
  if (args.kind == DrawKind::uniform) float_units<ToUniforms>(args, begin, end);
  if (args.kind == DrawKind::sign) sign_units(args, begin, end);
  if (args.kind == DrawKind::word) word_units(args, begin, end);
}

}  // namespace FM_ISA
}  // namespace fm
