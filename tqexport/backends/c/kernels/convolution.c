/* A convolution; a linear layer is one with a single place. Weights are (output channel, kernel row, kernel column,
 * input channel of the group), tables (width, output channel). */
typedef struct {
    int32_t input_rows, input_columns, input_channels;
    int32_t output_rows, output_columns, output_channels;
    int16_t groups, kernel_rows, kernel_columns, stride_rows, stride_columns;
    int16_t dilation_rows, dilation_columns, padding_rows, padding_columns; /* the padding in front */
    const uint8_t *codes;       /* of a quantised layer */
    const int8_t *weights;      /* of any other */
    const int32_t *biases;
    const int32_t *multipliers; /* negative where the weights are to be negated */
    const int8_t *exponents;    /* less NO_WEIGHTS where a channel is nothing but its bias */
} convolution;

#define NO_WEIGHTS 64

/* Copies what one window reads, zero point taken off and the padding filled in, and returns the sum of it all. */
static int32_t read_window(const convolution *layer, const int8_t *input, int16_t *window, int32_t row, int32_t column,
                           int32_t first_channel, int32_t channels, int32_t zero)
{
    int32_t sum = 0, i, j, k;
    for (i = 0; i < layer->kernel_rows; i++) {
        const int32_t y = row * layer->stride_rows - layer->padding_rows + i * layer->dilation_rows;
        for (j = 0; j < layer->kernel_columns; j++) {
            const int32_t x = column * layer->stride_columns - layer->padding_columns + j * layer->dilation_columns;
            if (y < 0 || y >= layer->input_rows || x < 0 || x >= layer->input_columns) {
                for (k = 0; k < channels; k++) {
                    window[k] = 0;
                }
            } else {
                const int8_t *pixel = input + (y * layer->input_columns + x) * layer->input_channels + first_channel;
                for (k = 0; k < channels; k++) {
                    window[k] = (int16_t)(pixel[k] - zero);
                    sum += window[k];
                }
            }
            window += channels;
        }
    }
    return sum;
}

/* The sum over one window for one output channel. */
static int32_t weighted(const convolution *layer, const int16_t *window, int32_t channel, int32_t size, int32_t total,
                        const width *at)
{
    if (layer->codes == NULL) {
        return times_weights(window, layer->weights + channel * size, size);
    }
    return at->step * (2 * times_codes(window, layer->codes, channel, size, at->shift) - at->highest * total);
}

/* A sum with its bias as a number of steps of the output's grid. */
static int32_t to_steps(int32_t sum, int32_t bias, int32_t multiplier, int32_t exponent)
{
    if (exponent < -NO_WEIGHTS / 2) {
        sum = 0;
        exponent += NO_WEIGHTS;
    }
    return multiplier < 0 ? scaled(bias - sum, -multiplier, exponent) : scaled(bias + sum, multiplier, exponent);
}

static void convolve(const convolution *layer, const int8_t *input, int8_t *output, int16_t *window,
                     const grid *source, const grid *target, const width *at)
{
    const int32_t channels = layer->input_channels / layer->groups, outputs = layer->output_channels / layer->groups;
    const int32_t size = channels * layer->kernel_rows * layer->kernel_columns;
    const int32_t *biases = layer->biases + at->row * layer->output_channels;
    const int32_t *multipliers = layer->multipliers + at->row * layer->output_channels;
    const int8_t *exponents = layer->exponents + at->row * layer->output_channels;
    int32_t row, column, group, i;
    for (row = 0; row < layer->output_rows; row++) {
        for (column = 0; column < layer->output_columns; column++) {
            for (group = 0; group < layer->groups; group++) {
                const int32_t total =
                    read_window(layer, input, window, row, column, group * channels, channels, source->zero);
                for (i = group * outputs; i < (group + 1) * outputs; i++) {
                    const int32_t sum = weighted(layer, window, i, size, total, at);
                    *output++ = to_level(to_steps(sum, biases[i], multipliers[i], exponents[i]), target);
                }
            }
        }
    }
}
