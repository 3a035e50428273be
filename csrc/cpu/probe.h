// What the kernels of op probe and of op divergence_step share: the walk over probes and the sign words of a probe.
#pragma once

#include "signs.h"

namespace fm {
namespace FM_ISA {

FM_INLINE uint32_t probe_tag(const ProbeArgs& args, int64_t probe) {
  return purpose_of(kStreamProbe, static_cast<uint32_t>(args.index + (args.first + probe) / args.share));
}

FM_INLINE View view_of_probe(const ProbeArgs& args, int64_t probe) {
  View view = args.view;
  view.data = static_cast<char*>(view.data) + probe * args.probe_stride * element_size(view.dtype);
  return view;
}

// The sign words of a tile of a structured probe: the drawn ones, turned by its parities.
FM_INLINE void turn_words(const ProbeArgs& args, int64_t probe, const Tile& tile, const SignWord* drawn, SignWord* words) {
  int64_t blocks = divide_up(args.shape.positions, kBlockSigns), run = 4 * row_blocks<ToSigns>(tile);
  for (int64_t c = 0; c < tile.channels; ++c) {
    int64_t block = (probe * args.shape.channels + tile.channel + c) * blocks + tile.position / kBlockSigns;
    for (int64_t i = 0; i < run; ++i) words[c * run + i] = drawn[c * run + i] ^ args.parities[4 * block + i];
  }
}

// Calls body(probe, view, begin, end) for the probes of units begin..end, with the units of each.
template <class Body>
FM_INLINE void for_each_probe(const ProbeArgs& args, int64_t begin, int64_t end, const Body& body) {
  int64_t units = args.tiling.units;
  while (begin < end) {
    int64_t probe = begin / units, last = lesser(end, (probe + 1) * units);
    body(probe, view_of_probe(args, probe), begin - probe * units, last - probe * units);
    begin = last;
  }
}

// The same for signs, tile by tile: body(probe, view, tile, words).
template <class Body>
FM_INLINE void for_each_sign_tile(const ProbeArgs& args, int64_t begin, int64_t end, const Body& body) {
  for_each_probe(args, begin, end, [&](int64_t probe, const View& view, int64_t first, int64_t last) {
    for_each_tile<ToSigns>(args.shape, args.tiling, args.key, probe_tag(args, probe), always, first, last, nothing_ahead,
                           [&](const Tile& tile, const float* drawn) {
                             if (!args.parities) return body(probe, view, tile, drawn_words(drawn));
                             SignWord words[kTileBuffer];
                             turn_words(args, probe, tile, drawn_words(drawn), words);
                             body(probe, view, tile, words);
                           });
  });
}

}  // namespace FM_ISA
}  // namespace fm
