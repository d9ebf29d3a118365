/* A token of each of several sequences through a decoder: the step that generating repeats.

The network is that of model/transformer.py, whose results tests hold this against. Every weight is
read once for all rows. What a row gets does not depend on the rows beside it: each sum is taken in
one order, whatever the number of rows and threads, so that texts do not depend on their batch.
Threads divide the rows of each matrix among them, in pieces that the next free one takes; the
residual stream is each thread's own, computed alike by all, which saves a meeting of the threads.

Legend: R rows, D width of the residual stream, K head width, a page 64 tokens.
native.py builds the structures below field by field. */

#include "matrix.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { PAGE = 64, BLOCK = 32, PIECE_BYTES = 1 << 20, SPINS = 4000, NAP_NANOSECONDS = 20000 };
enum Activation { GELU, GELU_TANH, RELU, RELU_SQUARED, SWIGLU };
enum Arrangement { SEQUENTIAL, PARALLEL, PARALLEL_TWO_NORMS };

#define LEAST_SHARE 1e-30f

typedef struct {
    const float *weight, *bias; /* no weight: no norm */
    int64_t rms;
    double eps;
} Norm;

typedef struct {
    Matrix up, gate, down;
    int64_t width;
} FeedForward; /* of experts: their matrices below each other */

typedef struct {
    Norm norm1, norm2, q_norm, k_norm, attn_out_norm, ffn_out_norm;
    Matrix q, k, v, o;
    FeedForward dense, experts; /* width 0: none */
    const float *router, *router_bias;
} Layer;

typedef struct {
    int64_t layers, d_model, heads, kv_heads, head_dim, rotary_width, interleaved, arrangement;
    int64_t activation, qk_norm_whole, num_experts, experts_per_token, sigmoid, normalise;
    int64_t position_offset, cache_format, pages, most_rows, threads;
    double router_scale;
    const Layer *layer;
    Matrix embedding, head;
    const float *positions, *slopes;
    Norm embed_norm, final_norm;
    void *keys, *values;
} Network;

typedef struct {
    int64_t rows;
    const int64_t *tokens, *positions, *tables;
    int64_t table_width;
    const float *cos, *sin;
    const float *outputs; /* of the final norm, rows of d_model: only the head; else NULL */
    float *logits;
    int64_t threads; /* that compute, at most those there are */
} Batch;

/* An output for each of some rows of a matrix and of x; with a gate the activation of both. */
typedef struct {
    const Matrix *matrix, *gate;
    int64_t first, count; /* rows of the matrix */
    int rows;
    const float *const *x;
    float *const *out;
} Product;

/* what a thread has of its own in a step */
typedef struct {
    float *x, *h, *attended, *scores, *chances;
    const float **rows, **pair_rows;
    float **outs, **pair_outs;
    int64_t *chosen;
    float *weights;
    Product *products;
    int division;
    int64_t number; /* of the thread */
} Own;

typedef struct Decoder Decoder;
typedef struct { Decoder *decoder; int64_t number; } Worker;

struct Decoder {
    Network net;
    Batch batch;
    Own *own; /* for each thread, that which calls first */
    pthread_t *workers;
    pthread_mutex_t lock;
    pthread_cond_t begin;
    _Atomic int64_t generation;
    int stopping;
    atomic_int arrived, phase, done;
    atomic_int *next; /* the next piece of each division of work in a step */
    int num_next;
    pthread_t caller;
    double lost_seconds; /* in which it waited for threads that did not run */
    float *q, *k, *v, *z, *joined, *hidden, *made; /* shared; rows of padded width */
    int64_t q_width, kv_width, d_width, hidden_width, num_own;
    Worker *worker;
};

static void activate(int64_t kind, float *up, const float *gate, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float u = up[i];
        if (kind == GELU) up[i] = 0.5f * u * (1.0f + erff(u * 0.70710678f));
        if (kind == RELU || kind == RELU_SQUARED) up[i] = u > 0 ? (kind == RELU ? u : u * u) : 0;
    }
    if (kind != SWIGLU && kind != GELU_TANH) return;
    for (int64_t i = 0; i < count; i += LANES) { /* 0.5 u (1 + tanh t) = u sigmoid(2 t) */
        float u[LANES] = {0}, g[LANES] = {0};
        size_t some = sizeof(float) * (size_t)(count - i < LANES ? count - i : LANES);
        memcpy(u, up + i, some);
        if (kind == SWIGLU) memcpy(g, gate + i, some);
        vec x = load_vec(u), inner = load_vec(g), y;
        if (kind == GELU_TANH) inner = 1.59576912f * (x + 0.044715f * x * x * x);
        y = x / (1.0f + exp_vec(-inner));
        if (kind == SWIGLU) y *= inner;
        memcpy(up + i, &y, some);
    }
}

INLINE void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* All threads wait for each other. A long wait means that a thread is not running, because other
programs are: this one then gives way, and the time counts as lost. */
static void meet(Decoder *d) {
    int phase = atomic_load(&d->phase);
    if (atomic_fetch_add(&d->arrived, 1) + 1 == d->batch.threads) {
        atomic_store(&d->arrived, 0);
        atomic_store(&d->phase, phase + 1);
        return;
    }
    for (int spins = 0; spins < SPINS; spins++) {
        if (atomic_load(&d->phase) != phase) return;
        pause_cpu();
    }
    double began = now();
    while (atomic_load(&d->phase) == phase) nanosleep(&(struct timespec){0, NAP_NANOSECONDS}, NULL);
    if (pthread_equal(pthread_self(), d->caller)) d->lost_seconds += now() - began;
}

/* Rows of a matrix that a thread takes at a time: large pieces, so that little is asked for in vain
at their ends, but some for each thread, so that one that is slower has fewer. */
static int64_t piece_rows(const Decoder *d, const Matrix *m, int64_t count) {
    int64_t share = count / (2 * d->batch.threads);
    int64_t most = PIECE_BYTES / bytes_of(m->format, m->columns);
    int64_t rows = share < most ? share : most;
    return rows < BLOCK ? BLOCK : (rows + BLOCK - 1) / BLOCK * BLOCK;
}

/* Ask for the beginning of a thread's first piece of the next product, before it waits for others. */
static void ask_ahead(const Decoder *d, const Own *own, const Matrix *m) {
    int64_t first = own->number * piece_rows(d, m, m->rows);
    int64_t row_bytes = bytes_of(m->format, m->columns), left = (m->rows - first) * row_bytes;
    const char *begin = (const char *)m->data + first * row_bytes;
    for (int64_t p = 0; p < AHEAD_BYTES && p < left; p += 64) __builtin_prefetch(begin + p, 0, 2);
}

/* rows first..last-1 of a product, a block at a time */
static void run_piece(const Decoder *d, const Product *product, int64_t first, int64_t last) {
    float gate[TILE_ROWS][BLOCK], *to[TILE_ROWS];
    for (int64_t from = first; from < last; from += BLOCK) {
        int64_t till = from + BLOCK < last ? from + BLOCK : last;
        multiply_all(product->matrix, product->first, from, till, last, product->rows, product->x,
                     product->out);
        if (product->gate == NULL) continue;
        for (int r = 0; r < product->rows; r += TILE_ROWS) {
            int some = product->rows - r < TILE_ROWS ? product->rows - r : TILE_ROWS;
            for (int j = 0; j < some; j++) to[j] = gate[j] - from;
            if (d->net.activation == SWIGLU)
                multiply_all(product->gate, product->first, from, till, last, some, product->x + r,
                             to);
            for (int j = 0; j < some; j++)
                activate(d->net.activation, product->out[r + j] + from, gate[j], till - from);
        }
    }
}

/* This thread's share of the products, then all meet; `next` is what comes after, if that is known.
The first piece of each thread is settled, the others go to whoever is free. */
static void run_products(Decoder *d, Own *own, const Product *products, int count,
                         const Matrix *next) {
    int64_t before = 0, size = 0, rows = 0;
    int p = -1;
    for (int64_t piece = own->number;;) {
        while (p < count && piece >= before + size) { /* the product that has this piece */
            before += size;
            if (++p == count) break;
            rows = piece_rows(d, products[p].matrix, products[p].count);
            size = (products[p].count + rows - 1) / rows;
        }
        if (p == count) break;
        int64_t first = (piece - before) * rows;
        run_piece(d, &products[p], first,
                  first + rows < products[p].count ? first + rows : products[p].count);
        piece = d->batch.threads + atomic_fetch_add(&d->next[own->division], 1);
    }
    if (next) ask_ahead(d, own, next);
    own->division++;
    meet(d);
}

/* the sum of (x - centre) or of its squares */
static float sum_about(const float *x, float centre, int64_t width, int power) {
    vec sums = {0};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        vec d = load_vec(x + i) - centre;
        sums += power == 2 ? d * d : d;
    }
    float total = sum_vec(sums);
    for (; i < width; i++) total += power == 2 ? (x[i] - centre) * (x[i] - centre) : x[i] - centre;
    return total;
}

static void normalise(const Norm *norm, const float *x, float *y, int64_t width) {
    if (norm->weight == NULL) {
        if (x != y) memcpy(y, x, sizeof(float) * (size_t)width);
        return;
    }
    float centre = norm->rms ? 0 : sum_about(x, 0, width, 1) / (float)width;
    double squares = sum_about(x, centre, width, 2);
    float factor = (float)(1.0 / sqrt(squares / (double)width + norm->eps));
    for (int64_t i = 0; i < width; i++) {
        y[i] = (x[i] - centre) * factor * norm->weight[i];
        if (norm->bias) y[i] += norm->bias[i];
    }
}

static void rotate(const Network *net, float *head, const float *cos, const float *sin) {
    int64_t pairs = net->rotary_width / 2;
    for (int64_t j = 0; j < pairs; j++) {
        int64_t a = net->interleaved ? 2 * j : j, b = net->interleaved ? 2 * j + 1 : j + pairs;
        float first = head[a], second = head[b];
        head[a] = first * cos[j] - second * sin[j];
        head[b] = second * cos[j] + first * sin[j];
    }
}

INLINE int64_t cache_place(const Network *net, int64_t layer, int64_t page, int64_t kv, int64_t at) {
    return (((layer * net->pages + page) * net->kv_heads + kv) * PAGE + at % PAGE) * net->head_dim;
}

static void store(const Network *net, void *cache, int64_t place, const float *head) {
    for (int64_t i = 0; i < net->head_dim; i++)
        if (net->cache_format == BF16) ((uint16_t *)cache)[place + i] = to_bf16(head[i]);
        else ((float *)cache)[place + i] = head[i];
}

/* norms and rotation of a row's key head and of the query heads that share it; keys are kept */
static void place_heads(Decoder *d, const Layer *layer, int64_t number, int row, int64_t kv) {
    const Network *net = &d->net;
    int64_t K = net->head_dim, group = net->heads / net->kv_heads, pairs = net->rotary_width / 2;
    const float *cos = d->batch.cos + row * pairs, *sin = d->batch.sin + row * pairs;
    float *k = d->k + row * d->kv_width + kv * K, *v = d->v + row * d->kv_width + kv * K;
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        float *q = d->q + row * d->q_width + h * K;
        if (!net->qk_norm_whole) normalise(&layer->q_norm, q, q, K);
        rotate(net, q, cos, sin);
    }
    if (!net->qk_norm_whole) normalise(&layer->k_norm, k, k, K);
    rotate(net, k, cos, sin);
    int64_t position = d->batch.positions[row];
    int64_t page = d->batch.tables[row * d->batch.table_width + position / PAGE];
    store(net, net->keys, cache_place(net, number, page, kv, position), k);
    store(net, net->values, cache_place(net, number, page, kv, position), v);
}

INLINE vec load_cached(int format, const char *head, int64_t i) {
    return format == BF16 ? load_bf16((const uint16_t *)head + i) : load_vec((const float *)head + i);
}

INLINE float one_cached(int format, const char *head, int64_t i) {
    return format == BF16 ? one_bf16(((const uint16_t *)head)[i]) : ((const float *)head)[i];
}

/* the head of token j in a sequence's pages; those after it in its page follow */
INLINE const char *cached(const Decoder *d, const void *cache, int64_t number, const int64_t *table,
                          int64_t kv, int64_t j) {
    const Network *net = &d->net;
    int64_t place = cache_place(net, number, table[j / PAGE], kv, j);
    return (const char *)cache + bytes_of((int)net->cache_format, place);
}

/* 16 `count` columns, from `first`, of all values by their shares */
INLINE void weigh_values(int format, int count, const Decoder *d, int64_t number, int64_t kv,
                         const int64_t *table, int64_t length, const float *shares, int64_t first,
                         float *z) {
    const int64_t size = bytes_of(format, d->net.head_dim);
    vec sums[4] = {{0}};
    for (int64_t start = 0; start < length; start += PAGE) {
        const char *value = cached(d, d->net.values, number, table, kv, start);
        int64_t end = length < start + PAGE ? length : start + PAGE;
        for (int64_t j = start; j < end; j++, value += size)
            UNROLL for (int i = 0; i < count; i++)
                sums[i] += shares[j] * load_cached(format, value, first + i * LANES);
    }
    memcpy(z, sums, sizeof(vec) * (size_t)count);
}

/* softmax(q k / sqrt K) v of one row and head over the pages of its sequence */
INLINE void attend(int format, const Decoder *d, int64_t number, int row, int64_t h, float *scores) {
    const Network *net = &d->net;
    const int64_t K = net->head_dim, kv = h / (net->heads / net->kv_heads), whole = K / LANES * LANES;
    const int64_t position = d->batch.positions[row], length = position + 1;
    const int64_t *table = d->batch.tables + row * d->batch.table_width, size = bytes_of(format, K);
    const float *q = d->q + row * d->q_width + h * K;
    const float scale = 1.0f / sqrtf((float)K), slope = net->slopes ? net->slopes[h] : 0;
    float *z = d->z + row * d->q_width + h * K, largest = -INFINITY;
    for (int64_t start = 0; start < length; start += PAGE) {
        const char *key = cached(d, net->keys, number, table, kv, start);
        for (int64_t j = start; j < length && j < start + PAGE; j++, key += size) {
            vec sums = {0};
            for (int64_t i = 0; i < whole; i += LANES)
                sums += load_vec(q + i) * load_cached(format, key, i);
            float score = sum_vec(sums);
            for (int64_t i = whole; i < K; i++) score += q[i] * one_cached(format, key, i);
            scores[j] = score * scale - slope * (float)(position - j);
            if (scores[j] > largest) largest = scores[j];
        }
    }
    vec totals = {0}, zero = {0};
    for (int64_t j = length; j % LANES; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < length; j += LANES) {
        vec p = exp_vec(load_vec(scores + j) - largest);
        totals += p;
        memcpy(scores + j, &p, sizeof p);
    }
    const float share = 1.0f / sum_vec(totals);
    for (int64_t j = 0; j < length; j += LANES) { /* products of subnormal numbers are slow */
        vec p = load_vec(scores + j) * share;
        p = choose(p < zero + LEAST_SHARE, zero, p);
        memcpy(scores + j, &p, sizeof p);
    }
    int64_t done = 0;
    for (; done + 4 * LANES <= K; done += 4 * LANES)
        weigh_values(format, 4, d, number, kv, table, length, scores, done, z + done);
    for (; done < whole; done += LANES)
        weigh_values(format, 1, d, number, kv, table, length, scores, done, z + done);
    for (int64_t i = whole; i < K; i++) {
        z[i] = 0;
        for (int64_t j = 0; j < length; j++)
            z[i] += scores[j] * one_cached(format, cached(d, net->values, number, table, kv, j), i);
    }
}

static void attend_row(const Decoder *d, int64_t number, int row, int64_t h, float *scores) {
    if (d->net.cache_format == BF16) attend(BF16, d, number, row, h, scores);
    else attend(FP32, d, number, row, h, scores);
}

static const float *const *row_pointers(Own *own, const float *base, int64_t width, int rows) {
    for (int r = 0; r < rows; r++) own->rows[r] = base + r * width;
    return own->rows;
}

static float *const *out_pointers(float **into, float *base, int64_t width, int rows) {
    for (int r = 0; r < rows; r++) into[r] = base + r * width;
    return into;
}

static void attention(Decoder *d, Own *own, const Layer *layer, int64_t number) {
    const Network *net = &d->net;
    int rows = (int)d->batch.rows;
    const float *const *x = row_pointers(own, own->h, d->d_width, rows);
    float **outs = own->outs;
    Product qkv[3] = {
        {&layer->q, NULL, 0, layer->q.rows, rows, x, out_pointers(outs, d->q, d->q_width, rows)},
        {&layer->k, NULL, 0, layer->k.rows, rows, x,
         out_pointers(outs + rows, d->k, d->kv_width, rows)},
        {&layer->v, NULL, 0, layer->v.rows, rows, x,
         out_pointers(outs + 2 * rows, d->v, d->kv_width, rows)},
    };
    run_products(d, own, qkv, 3, &layer->o);
    if (net->qk_norm_whole) { /* by one thread for each row, before heads are placed */
        for (int r; (r = atomic_fetch_add(&d->next[own->division], 1)) < rows;) {
            float *q = d->q + r * d->q_width, *k = d->k + r * d->kv_width;
            normalise(&layer->q_norm, q, q, layer->q.rows);
            normalise(&layer->k_norm, k, k, layer->k.rows);
        }
        own->division++;
        meet(d);
    }
    for (int i; (i = atomic_fetch_add(&d->next[own->division], 1)) < rows * net->kv_heads;)
        place_heads(d, layer, number, i / (int)net->kv_heads, i % net->kv_heads);
    own->division++;
    meet(d);
    for (int i; (i = atomic_fetch_add(&d->next[own->division], 1)) < rows * net->heads;)
        attend_row(d, number, i / (int)net->heads, i % net->heads, own->scores);
    own->division++;
    meet(d);
    Product o = {&layer->o, NULL, 0, layer->o.rows, rows, row_pointers(own, d->z, d->q_width, rows),
                 out_pointers(outs, d->joined, d->d_width, rows)};
    run_products(d, own, &o, 1, layer->dense.width ? &layer->dense.up : NULL);
    for (int r = 0; r < rows; r++)
        normalise(&layer->attn_out_norm, d->joined + r * d->d_width,
                  own->attended + r * d->d_width, net->d_model);
}

/* the experts of a row and their weights, as model/moe.py chooses them */
static void route(const Network *net, const Layer *layer, const float *h, Own *own, int row) {
    int64_t E = net->num_experts, A = net->experts_per_token;
    float *p = own->chances, largest = -INFINITY;
    double total = 0;
    for (int64_t e = 0; e < E; e++) {
        const float *weight = layer->router + e * net->d_model;
        vec sums = {0};
        int64_t i = 0;
        for (; i + LANES <= net->d_model; i += LANES) sums += load_vec(weight + i) * load_vec(h + i);
        p[e] = sum_vec(sums);
        for (; i < net->d_model; i++) p[e] += weight[i] * h[i];
        if (p[e] > largest) largest = p[e];
    }
    for (int64_t e = 0; e < E; e++) {
        p[e] = net->sigmoid ? 1.0f / (1.0f + expf(-p[e])) : expf(p[e] - largest);
        total += p[e];
    }
    if (!net->sigmoid)
        for (int64_t e = 0; e < E; e++) p[e] /= (float)total;
    float sum = 0, *weights = own->weights + row * A;
    int64_t *chosen = own->chosen + row * A;
    for (int64_t a = 0; a < A; a++) {
        int64_t best = -1;
        float best_by = 0;
        for (int64_t e = 0; e < E; e++) {
            float by = p[e] + (layer->router_bias ? layer->router_bias[e] : 0);
            int taken = 0;
            for (int64_t b = 0; b < a; b++) taken |= chosen[b] == e;
            if (!taken && (best < 0 || by > best_by)) best = e, best_by = by;
        }
        chosen[a] = best;
        weights[a] = p[best];
        sum += p[best];
    }
    for (int64_t a = 0; a < A; a++)
        weights[a] = (net->normalise ? weights[a] / sum : weights[a]) * (float)net->router_scale;
}

/* dense and expert parts of a feed-forward layer; the sum for each row ends in own->h */
static void feed_forward(Decoder *d, Own *own, const Layer *layer, const Matrix *next) {
    const Network *net = &d->net;
    int rows = (int)d->batch.rows, count = 0, pair = 0;
    int64_t A = net->experts_per_token, width = layer->experts.width;
    const float *const *x = row_pointers(own, own->h, d->d_width, rows);
    if (layer->dense.width)
        own->products[count++] = (Product){
            &layer->dense.up, &layer->dense.gate, 0, layer->dense.width, rows, x,
            out_pointers(own->outs, d->hidden, d->hidden_width, rows)};
    int dense = count;
    float *pair_hidden = d->hidden + rows * d->hidden_width, *pair_made = d->made + rows * d->d_width;
    if (width)
        for (int r = 0; r < rows; r++) route(net, layer, x[r], own, r);
    for (int64_t e = 0; width && e < net->num_experts; e++) {
        int first = pair;
        for (int i = 0; i < rows * A; i++) {
            if (own->chosen[i] != e) continue;
            own->pair_rows[pair] = x[i / A];
            own->pair_outs[pair++] = pair_hidden + i * d->hidden_width;
        }
        if (pair > first)
            own->products[count++] = (Product){
                &layer->experts.up, &layer->experts.gate, e * width, width, pair - first,
                own->pair_rows + first, own->pair_outs + first};
    }
    run_products(d, own, own->products, count, dense ? &layer->dense.down : NULL);
    if (dense)
        own->products[0] = (Product){
            &layer->dense.down, NULL, 0, net->d_model, rows,
            row_pointers(own, d->hidden, d->hidden_width, rows),
            out_pointers(own->outs, d->made, d->d_width, rows)};
    for (int i = 0; i < pair; i++) {
        int64_t number = (own->pair_outs[i] - pair_hidden) / d->hidden_width;
        own->pair_rows[i] = own->pair_outs[i];
        own->pair_outs[i] = pair_made + number * d->d_width;
    }
    for (int p = dense; p < count; p++) {
        own->products[p].first = own->products[p].first / width * net->d_model;
        own->products[p].matrix = &layer->experts.down;
        own->products[p].gate = NULL;
        own->products[p].count = net->d_model;
    }
    run_products(d, own, own->products, count, next);
    for (int r = 0; r < rows; r++) {
        float *y = own->h + r * d->d_width;
        memset(y, 0, sizeof(float) * (size_t)net->d_model);
        for (int64_t a = 0; width && a < A; a++)
            for (int64_t i = 0; i < net->d_model; i++)
                y[i] += own->weights[r * A + a] * pair_made[(r * A + a) * d->d_width + i];
        for (int64_t i = 0; dense && i < net->d_model; i++) y[i] += d->made[r * d->d_width + i];
        normalise(&layer->ffn_out_norm, y, y, net->d_model);
    }
}

static void embed(Decoder *d, Own *own) {
    const Network *net = &d->net;
    const Matrix *m = &net->embedding;
    for (int r = 0; r < d->batch.rows; r++) {
        float *x = own->x + r * d->d_width;
        int64_t token = d->batch.tokens[r], begin = token * m->columns;
        for (int64_t i = 0; i < m->columns; i++) {
            if (m->format == FP32) x[i] = ((const float *)m->data)[begin + i];
            if (m->format == BF16) x[i] = one_bf16(((const uint16_t *)m->data)[begin + i]);
            if (m->format == INT8)
                x[i] = ((const int8_t *)m->data)[begin + i] * ((const float *)m->scale)[token];
        }
        const float *place = net->positions;
        if (place) place += (d->batch.positions[r] + net->position_offset) * net->d_model;
        for (int64_t i = 0; place && i < net->d_model; i++) x[i] += place[i];
        normalise(&net->embed_norm, x, x, net->d_model);
    }
}

static void compute(Decoder *d, Own *own) {
    const Network *net = &d->net;
    int rows = (int)d->batch.rows;
    int64_t D = net->d_model, stride = d->d_width;
    own->division = 0;
    if (d->batch.outputs == NULL) embed(d, own);
    for (int64_t l = 0; l < net->layers && d->batch.outputs == NULL; l++) {
        const Layer *layer = &net->layer[l];
        for (int r = 0; r < rows; r++)
            normalise(&layer->norm1, own->x + r * stride, own->h + r * stride, D);
        attention(d, own, layer, l);
        for (int r = 0; r < rows; r++) {
            float *x = own->x + r * stride, *h = own->h + r * stride;
            if (net->arrangement == SEQUENTIAL)
                for (int64_t i = 0; i < D; i++) x[i] += own->attended[r * stride + i];
            if (net->arrangement != PARALLEL) normalise(&layer->norm2, x, h, D);
        }
        feed_forward(d, own, layer, l + 1 < net->layers ? &layer[1].q : &net->head);
        for (int64_t i = 0; i < rows * stride; i++)
            own->x[i] += net->arrangement == SEQUENTIAL ? own->h[i] : own->attended[i] + own->h[i];
    }
    for (int r = 0; r < rows; r++)
        if (d->batch.outputs)
            memcpy(own->h + r * stride, d->batch.outputs + r * D, sizeof(float) * (size_t)D);
        else
            normalise(&net->final_norm, own->x + r * stride, own->h + r * stride, D);
    Product head = {&net->head, NULL, 0, net->head.rows, rows,
                    row_pointers(own, own->h, stride, rows),
                    out_pointers(own->outs, d->batch.logits, net->head.rows, rows)};
    run_products(d, own, &head, 1, NULL);
}

static _Thread_local int out_of_memory;

static void *zeros(int64_t count, int64_t size) {
    size_t total = (size_t)((count * size + 63) / 64 * 64);
    void *p = aligned_alloc(64, total ? total : 64);
    if (p) memset(p, 0, total);
    else out_of_memory = 1;
    return p;
}

static Own own_memory(const Decoder *d) {
    const Network *net = &d->net;
    int64_t R = net->most_rows, pairs = R * (net->experts_per_token + 1);
    return (Own){
        .x = zeros(R * d->d_width, 4), .h = zeros(R * d->d_width, 4),
        .attended = zeros(R * d->d_width, 4), .scores = zeros(net->pages * PAGE + LANES, 4),
        .chances = zeros(net->num_experts, 4), .rows = zeros(R, 8), .pair_rows = zeros(pairs, 8),
        .outs = zeros(3 * R, 8), .pair_outs = zeros(pairs, 8), .chosen = zeros(pairs, 8),
        .weights = zeros(pairs, 4), .products = zeros(pairs + 1, sizeof(Product)),
    };
}

static void free_own(Own *own) {
    void *all[] = {own->x, own->h, own->attended, own->scores, own->chances, own->rows,
                   own->pair_rows, own->outs, own->pair_outs, own->chosen, own->weights,
                   own->products};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void *work(void *argument) {
    Worker worker = *(Worker *)argument;
    Decoder *d = worker.decoder;
    for (int64_t seen = 0;;) {
        for (int spins = 0; spins < SPINS && atomic_load(&d->generation) == seen; spins++) pause_cpu();
        pthread_mutex_lock(&d->lock);
        while (d->generation == seen && !d->stopping) pthread_cond_wait(&d->begin, &d->lock);
        seen = d->generation;
        int stopping = d->stopping, idle = worker.number >= d->batch.threads;
        pthread_mutex_unlock(&d->lock);
        if (stopping) break;
        if (idle) continue;
        compute(d, &d->own[worker.number]);
        atomic_fetch_add(&d->done, 1);
    }
    return NULL;
}

void decoder_close(Decoder *d);

/* NULL where there is not enough memory. With fewer threads where no more can be begun. */
Decoder *decoder_open(const Network *net, int64_t widest_hidden) {
    out_of_memory = 0;
    Decoder *d = zeros(1, sizeof *d);
    if (d == NULL) return NULL;
    d->net = *net;
    d->net.threads = 1; /* that run */
    int64_t R = net->most_rows, pairs = R * (net->experts_per_token + 1);
    d->q_width = padded(net->heads * net->head_dim);
    d->kv_width = padded(net->kv_heads * net->head_dim);
    d->d_width = padded(net->d_model);
    d->hidden_width = padded(widest_hidden);
    d->q = zeros(R * d->q_width, 4), d->z = zeros(R * d->q_width, 4);
    d->k = zeros(R * d->kv_width, 4), d->v = zeros(R * d->kv_width, 4);
    d->joined = zeros(R * d->d_width, 4), d->made = zeros(pairs * d->d_width, 4);
    d->hidden = zeros(pairs * d->hidden_width, 4);
    d->num_next = (int)(net->layers * 8 + 2);
    d->next = zeros(d->num_next, sizeof *d->next);
    d->workers = zeros(net->threads, sizeof *d->workers);
    d->worker = zeros(net->threads, sizeof *d->worker);
    d->own = zeros(net->threads, sizeof *d->own);
    for (d->num_own = 0; d->own && d->num_own < net->threads; d->num_own++)
        d->own[d->num_own] = own_memory(d), d->own[d->num_own].number = d->num_own;
    pthread_mutex_init(&d->lock, NULL);
    pthread_cond_init(&d->begin, NULL);
    if (out_of_memory) {
        decoder_close(d);
        return NULL;
    }
    for (int64_t t = 1; t < net->threads; t++) {
        d->worker[t] = (Worker){d, t};
        if (pthread_create(&d->workers[t], NULL, work, &d->worker[t]) != 0) break;
        d->net.threads++;
    }
    return d;
}

/* Seconds lost by waiting for threads that did not run. */
double decoder_step(Decoder *d, const Batch *batch) {
    pthread_mutex_lock(&d->lock);
    d->batch = *batch;
    if (d->batch.threads > d->net.threads) d->batch.threads = d->net.threads;
    d->caller = pthread_self();
    d->lost_seconds = 0;
    memset(d->next, 0, sizeof *d->next * (size_t)d->num_next);
    atomic_store(&d->done, 1);
    d->generation++;
    pthread_cond_broadcast(&d->begin);
    pthread_mutex_unlock(&d->lock);
    compute(d, &d->own[0]);
    while (atomic_load(&d->done) < d->batch.threads) sched_yield();
    return d->lost_seconds;
}

void decoder_close(Decoder *d) {
    pthread_mutex_lock(&d->lock);
    d->stopping = 1;
    pthread_cond_broadcast(&d->begin);
    pthread_mutex_unlock(&d->lock);
    for (int t = 1; t < d->net.threads; t++) pthread_join(d->workers[t], NULL);
    for (int64_t t = 0; t < d->num_own; t++) free_own(&d->own[t]);
    void *all[] = {d->q, d->k, d->v, d->z, d->joined, d->made, d->hidden, d->next, d->workers,
                   d->worker, d->own};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(d);
}
