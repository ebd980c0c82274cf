// The arguments of decode.cpp: field by field those of step.py. All whole numbers are int64, so that nothing is padded.
#pragma once
#include <cstdint>

enum Dtype : int64_t { F32, BF16, F64, I8, I4, F16 };

struct Mat {  // a contiguous weight; p is null where the model has none
    const void* p;
    int64_t dtype;
    // Of a weight in groups, whose dtype is I8 or I4 (layers/quantised/group_weight.py); else null.
    const void *scale, *zero;  // (rows, groups); zero points, int8, may be null
    int64_t scale_dtype, group;  // F32, BF16 or F16; columns of a group
};

struct DeltaNet {
    Mat in_qkv, in_z, in_b, in_a, conv, a_log, dt_bias, out_norm, out;
};

struct Attention {
    Mat q, q_bias, k, k_bias, v, v_bias, gate, gate_bias, o, o_bias, q_norm, k_norm;
    int64_t gate_rows;  // of the gate's projection, a head: head_dim, 1 or 0
};

struct FeedForward {  // a mixture of experts with a shared expert, or `shared_*` alone
    Mat router, experts_in, experts_out, shared_gate, shared_up, shared_down, shared_weight;
};

struct RecurrentState {     // of a Gated DeltaNet layer in a cache of b rows, before and after the step
    const void* conv_before;  // (b, kernel_size - 1, channels) in the model's dtype
    void* conv_after;
    const void* before;  // (b, value_heads, key_dim, value_dim)
    void* after;
    int64_t dtype;  // of `before` and `after`
    void *log_inputs, *log_keys, *log_deltas, *log_decay;  // (b, t, ...); null without an update log
};

struct Part {  // neighbouring positions of keys and values, (b, kv_heads, n, head_dim), and scales if they are int8
    void *k, *v, *k_scale, *v_scale;
    int64_t n, row, head, scale_row, scale_head;  // strides in elements
};

struct KeysAndValues {  // of a softmax attention layer in a cache: all positions, in order
    const Part* parts;
    int64_t count, dtype;
};

struct Layer {
    int64_t softmax, sparse;  // which mixer and which feed-forward
    Mat norm_in, norm_post;
    DeltaNet delta_net;
    Attention attention;
    FeedForward feed_forward;
    const RecurrentState* recurrent;  // one a cache; null in a softmax layer
    const KeysAndValues* kv;          // one a cache; null in a Gated DeltaNet layer
};

struct EmbeddingAndHead {
    Mat embedding, norm, head;
    Mat norm_embedding, norm_hidden, fc, fc_bias;  // of the MTP layer, whose own final norm `norm` then is; else null
    int64_t vocab;
};

struct Row {  // a sequence that a call extends: row `index` of a cache
    int64_t cache, index;
    int64_t first, count;  // its tokens in the call
    int64_t past;          // tokens before
};

struct Call {  // n tokens, row by row
    const Row* rows;
    int64_t row_count;
    const int64_t* ids;              // (n,)
    const void *const *cos, *const *sin;  // of each token's position: (rotary,) in the model's dtype
    const int64_t* wanted;           // the tokens after which logits are wanted, in order
    int64_t wanted_count;
    void *hidden, *logits;           // (n, width), (wanted_count, vocab)
};

struct Sizes {
    int64_t layers, width, dtype;
    int64_t heads, kv_heads, head_dim, rotary, zero_centred;
    int64_t key_heads, value_heads, key_dim, value_dim, kernel_size;
    int64_t experts, top_k, inner, shared_intermediate_size, dense_inner, norm_topk_prob;
    double eps;
};
