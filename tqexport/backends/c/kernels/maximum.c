/* The greatest level in each window; what lies outside of the input does not count. */
typedef struct {
    int32_t input_rows, input_columns, output_rows, output_columns, channels;
    int16_t kernel_rows, kernel_columns, stride_rows, stride_columns;
    int16_t dilation_rows, dilation_columns, padding_rows, padding_columns; /* the padding in front */
} window_maximum;

static void maximum(const window_maximum *pool, const int8_t *input, int8_t *output)
{
    int32_t row, column, channel, i, j;
    for (row = 0; row < pool->output_rows; row++) {
        for (column = 0; column < pool->output_columns; column++) {
            for (channel = 0; channel < pool->channels; channel++) {
                int8_t greatest = -128;
                for (i = 0; i < pool->kernel_rows; i++) {
                    const int32_t y = row * pool->stride_rows - pool->padding_rows + i * pool->dilation_rows;
                    for (j = 0; j < pool->kernel_columns; j++) {
                        const int32_t x = column * pool->stride_columns - pool->padding_columns + j * pool->dilation_columns;
                        if (y >= 0 && y < pool->input_rows && x >= 0 && x < pool->input_columns) {
                            const int8_t level = input[(y * pool->input_columns + x) * pool->channels + channel];
                            greatest = level > greatest ? level : greatest;
                        }
                    }
                }
                *output++ = greatest;
            }
        }
    }
}
