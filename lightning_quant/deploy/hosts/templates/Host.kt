// Runs {{ contract.file | kotlin }} on Android, on the NPU of a Snapdragon or on the CPU. Made by lightning-quant from
// io.json; copy it before you change it.
//
//   dependencies {
//       implementation("com.microsoft.onnxruntime:onnxruntime-android:1.24.3")  // or later
//       implementation("com.qualcomm.qti:onnxruntime-android-qnn:2.6.0")        // the NPU
//       implementation("com.qualcomm.qti:qnn-runtime:2.45.0")                   // of the version that 2.6.0 names
//   }
//
//   val network = Network(assets.open({{ contract.file | kotlin }}).readBytes(), npu = true)
{% for one in contract.inputs if one.holds == "image" %}
//   val pixels = IntArray({{ sizes(one)[2] }} * {{ sizes(one)[1] }})
//   Bitmap.createScaledBitmap(photo, {{ sizes(one)[2] }}, {{ sizes(one)[1] }}, true).getPixels(pixels, 0, {{ sizes(one)[2] }}, 0, 0, {{ sizes(one)[2] }}, {{ sizes(one)[1] }})
{% endfor %}
//   // in AndroidManifest.xml: extractNativeLibs="true", and <uses-native-library android:name="libcdsprpc.so"
//   // android:required="false"/>; before the network is made: Os.setenv("ADSP_LIBRARY_PATH",
//   // applicationInfo.nativeLibraryDir, true)
//   val answer = network.run({% for one in contract.inputs %}{{ ", " if not loop.first }}{{ "pixels" if one.holds == "image" else "input%d" % loop.index0 }}{% endfor %})
//
// Compiled by Kotlin 2.4 against ONNX Runtime's Java API. Not run on a phone.

package network

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.DoubleBuffer
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer
import java.nio.ShortBuffer

/** The classes that the network tells apart, by index; empty where they are not known. */
val CLASSES: List<String> = listOf(
{% for name in names %}
    {{ name | kotlin }},
{% endfor %}
)

/** Their colors, 0xffrrggbb; 0 where none is known. */
val COLORS: IntArray = intArrayOf(
{% for color in colors %}
    0x{{ color }}.toInt(),
{% endfor %}
)

/** What the network returns for one sample, in the order of its memory. */
class Answer(
{% for one in contract.outputs %}
    /** {{ one.name | kotlin }}, {{ one.holds }} of shape {{ one.shape | join(" x ") }}{% if one in coded %}: numbers are (integer - {{ one.zero_point or 0 }}) * {{ one.scale }}, see [real{{ loop.index0 }}]{% endif %}. */
    val output{{ loop.index0 }}: {{ kotlin_type(one) }},
{% endfor %}
) {
{% for one in coded %}
    /** The number that element [index] of output{{ position(contract.outputs, one) }} stands for. */
    fun real{{ position(contract.outputs, one) }}(index: Int): Float =
        ((output{{ position(contract.outputs, one) }}[index].toInt() and {{ "0xff" if one.type == "uint8" else "0xffff" }}) - {{ one.zero_point or 0 }}) * {{ one.scale }}.toFloat()
{% endfor %}
}

/**
 * The network. One call of [run] at a time.
 *
 * @param model content of the ONNX file.
 * @param npu whether it runs on the NPU; else on the CPU, every operation as it is written.
 */
class Network(model: ByteArray, npu: Boolean) : AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session: OrtSession

    init {
        OrtSession.SessionOptions().use { options ->
            if (npu) {
                if (environment.epDevices.none { it.epName == PROVIDER }) {
                    environment.registerExecutionProviderLibrary(PROVIDER, "libonnxruntime_providers_qnn.so")
                }
                val devices = environment.epDevices.filter { it.epName == PROVIDER }
                check(devices.isNotEmpty()) { "this phone offers no NPU to ONNX Runtime" }
                options.addConfigEntry("session.disable_double_qdq_remover", "1") // two roundings stay two
                options.addExecutionProvider(devices, mapOf("backend_path" to "libQnnHtp.so"))
            } else {
                options.setOptimizationLevel(OrtSession.SessionOptions.OptLevel.NO_OPT)
            }
            session = environment.createSession(model, options)
        }
    }

    /**
     * Runs the network on one sample.
     *
{% for one in contract.inputs %}
     * @param input{{ loop.index0 }} {{ one.name | kotlin }}: {% if one.holds == "image" %}{{ sizes(one)[2] }} x {{ sizes(one)[1] }} pixels as Bitmap.getPixels gives them{% else %}{{ elements(one) }} elements, shape {{ one.shape | join(" x ") }}{% endif %}.
{% endfor %}
     */
    fun run({% for one in contract.inputs %}{{ ", " if not loop.first }}input{{ loop.index0 }}: {{ "IntArray" if one.holds == "image" else kotlin_type(one) }}{% endfor %}): Answer {
        val inputs = LinkedHashMap<String, OnnxTensor>()
        try {
{% for one in contract.inputs %}
            inputs[{{ one.name | kotlin }}] = OnnxTensor.createTensor(environment, {{ kotlin_buffer(one, loop.index0) }}, longArrayOf({{ one.shape | join(", ") }}){{ kotlin_kind(one) }})
{% endfor %}
            session.run(inputs).use { results ->
                return Answer(
{% for one in contract.outputs %}
                    {{ kotlin_read(one) }},
{% endfor %}
                )
            }
        } finally {
            inputs.values.forEach { it.close() }
        }
    }

    override fun close() = session.close()

    private fun OrtSession.Result.bytes(name: String): ByteBuffer =
        (get(name).get() as OnnxTensor).byteBuffer.order(ByteOrder.nativeOrder())

    companion object {
        private const val PROVIDER = "QNNExecutionProvider"

        /** Arranges pixels as an input takes them, [shifts] telling which bits of a pixel each channel is. */
        fun arrange(pixels: IntArray, shifts: IntArray, channelsLast: Boolean): ByteArray {
            val bytes = ByteArray(pixels.size * shifts.size)
            for (at in pixels.indices) {
                for (channel in shifts.indices) {
                    val to = if (channelsLast) at * shifts.size + channel else channel * pixels.size + at
                    bytes[to] = (pixels[at] shr shifts[channel]).toByte()
                }
            }
            return bytes
        }

        /** Makes pixels gray, as ITU-R 601 weighs colors. */
        fun gray(pixels: IntArray) = IntArray(pixels.size) {
            val (red, green, blue) = intArrayOf(pixels[it] shr 16 and 255, pixels[it] shr 8 and 255, pixels[it] and 255)
            (299 * red + 587 * green + 114 * blue + 500) / 1000
        }
    }
}
